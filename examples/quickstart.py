"""Prefill a long prompt block-sparsely with the embedded model, and see what was read.

python examples/quickstart.py
"""

import torch

import seerattention as seer

LENGTH = 8192


def main() -> None:
    model, tokenizer = seer.testbed.load()
    text = seer.testbed.book_texts("test")[0]
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids[:, :LENGTH].to(model.device)

    # Any supported Hugging Face model works the same way; see the README for how to train gates for yours.
    seer.attach(model, seer.testbed.gates_path(), prefill=seer.TopK(0.1))

    with seer.record(model) as stats:
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    print(f"sparse: read {100 * stats.density:.1f} % of the attention blocks of {prompt.shape[1]} tokens")
    print(tokenizer.decode(output[0, prompt.shape[1] :]))

    with seer.dense(model):  # the same model, densely
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=20, do_sample=False)
    print("dense:")
    print(tokenizer.decode(output[0, prompt.shape[1] :]))

    seer.detach(model)  # bit for bit the model that it was


if __name__ == "__main__":
    main()
