"""What an import costs: packages, time, network; each in a fresh interpreter."""

import os
import subprocess
import sys
import textwrap

from test_architecture import ROOT, modules, room_of

import kernels


def run_python(code: str, **environment: str) -> str:
    """The output of `code` in a fresh interpreter at the root of the repository."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_settings_and_counts_need_no_torch():
    run_python(
        """
        import sys
        import moe_lm, moe_lm.cli, moe_lm.config, moe_lm.scaling.counts
        assert moe_lm.__version__ and not {"torch", "numpy", "kernels"} & set(sys.modules), "a package is loaded"
        """
    )


def test_importing_touches_no_gpu_no_network_and_no_large_package():
    """Of every module but those that need Triton, and the programs, which the same modules are all that they import."""
    programs, triton = ("train.py", "serve.py"), ("kernels.gpu.", "kernels.check.")
    names = [name for name in modules() if room_of(name) not in programs and not name.startswith(triton)]
    run_python(
        f"""
        import sys

        def watch(event, args):
            assert not event.startswith("socket.connect"), args

        sys.addaudithook(watch)
        import kernels, moe_lm, torch
        unwanted = {{"transformers", "datasets", "huggingface_hub", "triton"}}
        assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
        for name in {names}:
            __import__(name)
        unwanted.remove("triton")  # torch brings it where it is installed
        assert not unwanted & set(sys.modules), unwanted & set(sys.modules)
        assert not torch.cuda.is_initialized()
        """
    )


def test_transformers_works_beside_our_kernels():
    """It looks for a library of that name, and asks it for its version."""
    assert kernels.__version__ == "0.1.0"
    shown = run_python(
        """
        import kernels
        from transformers import MixtralConfig, MixtralForCausalLM

        model = MixtralForCausalLM(MixtralConfig(
            vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, num_local_experts=2,
        ))
        print(model(model.dummy_inputs["input_ids"] % 64).logits.shape[-1], kernels.__file__)
        """,
        HF_HUB_OFFLINE="1",
    )
    assert shown == f"64 {ROOT / 'kernels' / '__init__.py'}"
