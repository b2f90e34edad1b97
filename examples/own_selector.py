"""Try an idea of your own for choosing blocks, without gates: a function from queries and keys to block indices.

    python examples/own_selector.py

Here: the first block and the latest ones ("attention sinks"), compared with the true block maxima (the oracle) and
with the trained gates, on the same text.
"""

import torch

import seerattention as seer
from seerattention.evaluate import Setting, cut_documents, evaluate_perplexity

LENGTH, DENSITY = 4096, 0.2


def sinks_and_window(q, k, *, layer, scale, lengths):
    """Each query block reads block 0 and its latest blocks, about DENSITY of those that it could read."""
    batch, heads, length, _ = q.shape
    blocks = -(-length // 64)
    rows = torch.arange(blocks, device=q.device)[:, None]
    columns = torch.arange(blocks, device=q.device)[None, :]
    window = (DENSITY * (rows + 1)).ceil().clamp(min=2) - 1  # one block of the budget is the first one
    mask = (rows - columns < window) | (columns == 0)
    return seer.BlockIndices.from_mask(mask.expand(batch, heads, -1, -1), block_size=64)


def main() -> None:
    model, tokenizer = seer.testbed.load()
    texts = [tokenizer(text, add_special_tokens=False).input_ids for text in seer.testbed.book_texts("test")]
    settings = [
        Setting.dense(),
        Setting("sinks and window", selector=sinks_and_window),
        Setting("trained gates", gates=seer.testbed.gates_path(), policy=seer.TopK(DENSITY)),
        Setting("oracle", selector=seer.baselines.Oracle(seer.TopK(DENSITY))),
    ]
    documents = cut_documents(texts, LENGTH, count=2, bos=tokenizer.bos_token_id)
    for result in evaluate_perplexity(model, documents, settings):
        perplexity, error = result.last_quarter()
        print(f"{result.setting:18} density {result.density:.3f}   perplexity {perplexity:.2f} ± {error:.2f}")


if __name__ == "__main__":
    main()
