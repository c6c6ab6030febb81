"""What is wrong with this job, on which rank: hangs, wrong calls, deaths, drift, unused parameters, stragglers.

    from ch03_ddp import diagnose

    with diagnose.watch(ctx, timeout_s=60) as watch:          # hangs, deaths, errors; check=True: before every call
        ddp = watch.model(DistributedDataParallel(model))     # and what happens inside backward
        print(diagnose.unused(ctx, ddp, lambda: loss(ddp, batch)))
        for batch in batches:
            ...
            watch.step()
        print(watch.straggler(), diagnose.desync(ctx, ddp, optimizer))

The three questions answer with a Verdict or None. The watch raises Fault, an error of one line, on every rank.
"""

from ch03_ddp.diagnose.fingerprints import desync
from ch03_ddp.diagnose.trial import unused
from ch03_ddp.diagnose.verdict import Fault, Verdict
from ch03_ddp.diagnose.watcher import watch

__all__ = ["Fault", "Verdict", "desync", "unused", "watch"]
