"""Distil gates for a model from its own attention, a few steps only, and save them.

    python examples/distill_gates.py [folder]

For a real run use ``seer distill``: it reads text files and data sets, resumes after a kill and reports progress.
"""

import sys

import seerattention as seer

LENGTH, STEPS = 2048, 10


def main(folder: str = "my-gates") -> None:
    model, tokenizer = seer.testbed.load()
    ids = tokenizer(seer.testbed.book_texts("train")[0], return_tensors="pt", add_special_tokens=False).input_ids[0]
    sequences = ids[: len(ids) // LENGTH * LENGTH].view(-1, 1, LENGTH)
    batches = [{"input_ids": sequence} for sequence in sequences[1 : STEPS + 1]]

    seer.attach(model, seer.GateConfig(block_size=64))
    history = seer.distill(
        model,
        batches,
        seer.DistillConfig(learning_rate=3e-3, warmup=2),
        eval_batches=[{"input_ids": sequences[0]}],  # held out: block recall is measured on it before and after
        on_step=lambda report: print(f"step {report.step}: loss {report.loss}"),
    )
    for layer, (before, after) in history.recall.items():
        print(f"{layer}: block recall {before:.3f} -> {after:.3f} at density {history.recall_density}")

    seer.save_gates(model, folder)
    print(f"saved; use them with seer.attach(model, {folder!r})")


if __name__ == "__main__":
    main(*sys.argv[1:])
