"""The benchmark for GPUs, on a CPU: steps and loop at tiny shapes, and how it counts kernels."""

import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

from benchmarks import gpu_step
from tests import fork_server

REPO = Path(__file__).parent.parent
# Lines as XLA writes them, but for long attributes.
PROGRAM = """
  %bitcast.7 = bf16[96,768]{1,0} bitcast(%p1)
  %lt.1 = (bf16[96,64]{1,0}, s8[33554432]{0}) custom-call(%bitcast.7, %p2), custom_call_target="__cublas$lt$matmul", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  ROOT %lt.2 = (f32[4,768,32]{2,1,0}, s8[8]{0}) custom-call(%stack.1, %p2), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  %stack.1 = bf16[4,96,768]{2,1,0} bitcast(%p1)
  %fwd.0 = (bf16[8,12,78,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k), custom_call_target="__cudnn$fmhaSoftmax", \
operand_layout_constraints={bf16[8,78,12,64]{3,2,1,0}, bf16[8,512,12,64]{3,2,1,0}}
  %bwd.0 = (bf16[8,12,78,64]{3,1,2,0}) custom-call(%q, %k), custom_call_target="__cudnn$fmhaSoftmaxBackward", \
operand_layout_constraints={bf16[8,78,12,64]{3,2,1,0}, bf16[8,512,12,64]{3,2,1,0}}
  %fusion.1 = f32[8]{0} fusion(%p1), kind=kLoop, calls=%fused.1
  %sort.1 = s32[8]{0} sort(%p1), dimensions={0}
"""


def test_operations_and_kernels_of_a_compiled_program():
    matmuls = 2 * 96 * 64 * 768 + 2 * 4 * 768 * 32 * 96
    scores = 8 * 12 * 78 * 512 * 64
    assert gpu_step.count_kernels(PROGRAM) == {
        "flops": matmuls + (2 + 5) * 2 * scores,
        "matmuls": 2,
        "attention_forward": 1,
        "attention_backward": 1,
        "fusions": 1,
        "sorts": 1,
    }


@pytest.mark.slow
def test_the_step_needs_jax_flax_and_optax_only():
    others = ("clu", "ml_collections", "pyarrow", "tensorflow", "tokenizers", "transformers")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({others})); sys.path.insert(0, 'benchmarks'); "
        "import gpu_step, reference_step; gpu_step.model_config(gpu_step.SHAPES['tiny'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_steps_and_loop_are_measured(monkeypatch, capsys):
    def run(command, *, timeout=300, env=None, cwd=None, **_):
        return fork_server.run(command, timeout=timeout, env=env, cwd=cwd)

    forks = types.SimpleNamespace(**vars(subprocess) | {"run": run, "Popen": fork_server.Process})
    monkeypatch.setattr(gpu_step, "subprocess", forks)
    monkeypatch.setenv("XLA_FLAGS", fork_server.xla_flags(1))
    monkeypatch.syspath_prepend(REPO / "benchmarks")
    flags = "--tiny --minutes=20 --measure=steps,loop --shapes=tiny-modernbert --sides=ours"
    monkeypatch.setattr(sys, "argv", ["gpu_step.py", *flags.split()])
    gpu_step.main()
    printed = capsys.readouterr().out
    assert re.search(r"^  ours dots +2 sequences +[\d,]+ tokens/s .* loss 5\.\d+$", printed, re.MULTILINE)
    assert re.search(r"^  loop / step alone +\d", printed, re.MULTILINE)
