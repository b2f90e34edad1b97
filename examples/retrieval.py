"""Can the model still find things when it reads only a part of its prompt? Dense, oracle and gates on the same samples.

    python examples/retrieval.py

``seer eval`` does this with tables, a report and JSON, for any model.
"""

import seerattention as seer
from seerattention.evaluate import Setting, evaluate_retrieval, make_samples
from seerattention.tasks import TaskGenerator

LENGTH, SAMPLES, QUESTIONS = 4096, 2, 8


def main() -> None:
    model, tokenizer = seer.testbed.load()
    books = [tokenizer(text, add_special_tokens=False).input_ids for text in seer.testbed.book_texts("test")]
    generator = TaskGenerator(tokenizer, books, split="test", seed=0)
    samples = make_samples(generator, ["multikey", "keyvalue"], LENGTH, SAMPLES, questions=QUESTIONS)
    settings = [Setting.dense()]
    for density in (0.2, 0.1):
        settings.append(Setting(f"oracle {density}", selector=seer.baselines.Oracle(seer.TopK(density))))
        settings.append(Setting(f"gates {density}", gates=seer.testbed.gates_path(), policy=seer.TopK(density)))
    # method="generate", the default, decodes every answer from a prompt of its own: what a user gets, and slower.
    for result in evaluate_retrieval(model, samples, settings, method="teacher_forcing"):
        scores = ", ".join(f"{task} {100 * result.accuracy([task]):.0f} %" for task in result.correct)
        print(f"{result.setting:12} density {result.density:.3f}   {scores}")


if __name__ == "__main__":
    main()
