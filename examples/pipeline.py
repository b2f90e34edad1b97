"""An attached model in a transformers pipeline: long prompts are read sparsely, short ones as ever.

python examples/pipeline.py
"""

import transformers

import seerattention as seer

LENGTH = 4096


def main() -> None:
    model, tokenizer = seer.testbed.load()
    seer.attach(model, seer.testbed.gates_path(), prefill=seer.TopK(0.2))
    generate = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)

    ids = tokenizer(seer.testbed.book_texts("test")[0], add_special_tokens=False).input_ids[:LENGTH]
    for prompt in (tokenizer.decode(ids), "The old captain looked at the sea"):
        with seer.record(model) as stats:
            (answer,) = generate(prompt, max_new_tokens=20, do_sample=False, return_full_text=False)
        tokens = len(tokenizer(prompt).input_ids)
        print(f"{tokens} tokens at density {stats.prompt_density:.2f}: {answer['generated_text']!r}")


if __name__ == "__main__":
    main()
