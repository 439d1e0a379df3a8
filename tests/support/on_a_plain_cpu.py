"""Run a script with bitsandbytes as on a CPU of any age; print which layers it holds in 4 bits.

    python tests/support/on_a_plain_cpu.py tests/support/launch.py train.py LOAD_IN_4BIT=true ...

On a CPU that multiplies bfloat16, bitsandbytes packs its weights for prediction and can't train
after that.
"""

import runpy
import sys

import bitsandbytes.nn.modules as modules
import peft

if __name__ == "__main__":
    modules.has_avx512bf16 = lambda: False
    get_peft_model = peft.get_peft_model

    def get_and_print(model, config):
        layers = [
            name for name, layer in model.named_modules() if isinstance(layer, modules.Linear4bit)
        ]
        kinds = dict.fromkeys(name.rpartition(".")[2] for name in layers)
        print("in 4 bits:", *kinds, file=sys.stderr, flush=True)
        return get_peft_model(model, config)

    peft.get_peft_model = get_and_print
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
