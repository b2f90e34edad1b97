"""Read a long prompt sparsely and print the answer while it is generated, with transformers' TextIteratorStreamer.

python examples/streaming.py
"""

import contextvars
import threading

import torch
from transformers import TextIteratorStreamer

import seerattention as seer

LENGTH = 8192


def main() -> None:
    model, tokenizer = seer.testbed.load()
    seer.attach(model, seer.testbed.gates_path(), prefill=seer.RelativeThreshold(1.0))
    tokens = tokenizer(seer.testbed.book_texts("test")[0], add_special_tokens=False).input_ids
    prompt = torch.tensor([tokens[:LENGTH]], device=model.device)

    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 40, "do_sample": False}
    with seer.record(model) as stats:
        # What is attached holds in every thread. Blocks like `record` and `dense` hold in the context that opened them,
        # so a thread that is to see them runs in a copy of it.
        run = contextvars.copy_context().run
        thread = threading.Thread(target=run, args=(model.generate, prompt), kwargs={"streamer": streamer, **options})
        thread.start()
        for piece in streamer:
            print(piece, end="", flush=True)
        thread.join()
    print(f"\nread {100 * stats.density:.1f} % of the attention blocks of {prompt.shape[1]} tokens")


if __name__ == "__main__":
    main()
