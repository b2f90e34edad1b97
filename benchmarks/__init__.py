"""Benchmarks: correctness first, then times; JSON under ``results/<device>/``, and tables made from it.

    python -m benchmarks.run --op block_sparse_attention     one op against its rivals (also: --op all)
    python -m benchmarks.e2e --model llama-3.1-8b            time to first token of a whole model, dense and sparse
    python -m benchmarks.distill --model llama-3.1-8b        one distillation step: tokens a second, memory
    python -m benchmarks.chunks                              prompts in chunks against one shot: answers, perplexity
    python -m benchmarks.stretched                           beyond the model's length, its rotary embedding stretched
    python -m benchmarks.report                              docs/performance.md from the results that there are

Every command takes ``--device cpu --tiny``: the same code in seconds, to rehearse a run; its numbers mean nothing and
go to ``runs/rehearsal``. Run them from the repository's root. What this folder shares with ``seer bench`` is in
``seerattention.evaluate`` (``kernels.py``, ``timing.py``).
"""
