r"""Run a script on the CPU, where accelerate's FSDP otherwise does nothing, sharded as on GPUs.

    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 \
        tests/support/sharded.py tests/support/launch.py train.py ...

Each process prints how much of the model it holds, and aborts if it leaves its end to Python: the
threads of FSDP's process groups are still there, and may make it abort now and then.
"""

import atexit
import os
import runpy
import sys

from accelerate import accelerator, state
from torch.distributed.tensor import DTensor

begin, prepare = state.AcceleratorState.__init__, accelerator.fsdp2_prepare_model


def begin_as_on_gpus(self, *args, **kwargs):
    """AcceleratorState makes FSDP of MULTI_GPU, but not of MULTI_CPU."""
    if state.PartialState(cpu=True).distributed_type == state.DistributedType.MULTI_CPU:
        state.PartialState().distributed_type = state.DistributedType.MULTI_GPU
    begin(self, *args, **kwargs)


def prepare_and_print(*args):
    model = prepare(*args)
    own, whole = 0, 0
    for weight in model.parameters():
        own += (weight.to_local() if isinstance(weight, DTensor) else weight).numel()
        whole += weight.numel()
    print(f"holds {own / whole:.2f} of the model", file=sys.stderr, flush=True)
    return model


if __name__ == "__main__":
    state.AcceleratorState.__init__ = begin_as_on_gpus
    accelerator.fsdp2_prepare_model = prepare_and_print
    atexit.register(os.abort)
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
