"""What stands in for a GPU while kernels are compiled without one, and what the compilers' logs say."""

from __future__ import annotations

import contextlib
import io
import re


class Driver:
    """What triton asks its driver for when it compiles."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


class Compiling:
    """In place of a kernel: launching it compiles it and keeps the result."""

    def __init__(self, kernel, results):
        self.kernel, self.results = kernel, results

    def __getitem__(self, grid):
        def launch(*args, **options):
            log = io.StringIO()
            with contextlib.redirect_stdout(log):
                compiled = self.kernel.warmup(*args, grid=grid, **options)
            self.results.append((compiled, log.getvalue()))

        return launch


def describe(compiled, log):
    """Numbers from the log of ptxas, from the assembly of AMD's compiler, and from triton's metadata."""
    facts = {"shared": compiled.metadata.shared, "num_warps": compiled.metadata.num_warps}
    if "cubin" in compiled.asm:
        assembly = compiled.asm["ptx"]
        return facts | {
            "bytes": len(compiled.asm["cubin"]),
            "registers": int(re.search(r"Used (\d+) registers", log)[1]),
            "spills": sum(map(int, re.findall(r"(\d+) bytes spill", log))),
            "serialized": "C7512" in log or "serialized" in log,
            "wgmma": assembly.count("wgmma.mma_async"),
            "tma": assembly.count("cp.async.bulk.tensor"),
        }
    assembly = compiled.asm["amdgcn"]
    return facts | {
        "bytes": len(compiled.asm["hsaco"]),
        "registers": int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1]),
        "spills": int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1]),
    }
