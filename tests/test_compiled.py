"""What tests/resources.py remembers of compiled kernels."""
import json

import pytest

from tests import resources
from tests.conftest import compiles
from tfkernels._launch import Config
from tfkernels.attention.triton import parts

pytestmark = compiles
KERNEL = parts._attention_merge, {"HEAD_DIM": 64, "D": 64}, Config(0, 0, 4, 3)
FOUND = [11, 0, 0, {"mma.sync": 2}, 1, 1, [1.0], 0, 0]


@pytest.fixture
def ask(monkeypatch, tmp_path):
    """A function that asks for KERNEL where `known` holds one kernel's resources."""
    def asked(key: str | None, found: list, compared: int = 16):
        monkeypatch.setattr(resources, "ASKED", tmp_path / "asked")
        monkeypatch.setattr(resources, "COMPARED", compared)
        monkeypatch.setattr(resources, "known", lambda: {} if key is None else {key: found})
        return resources.resources(*KERNEL, architecture=90, element_size=2)
    return asked


def key(architecture: int = 90, kernel=KERNEL, element: str = "bf16") -> str:
    return resources.key_of(*kernel, architecture, element, (), True)


def no_compiler(*arguments):
    raise RuntimeError("compiled")


def test_what_is_known_is_not_compiled(ask, monkeypatch, tmp_path):
    monkeypatch.setattr(resources, "compiled", no_compiler)
    monkeypatch.setattr(resources, "key_of", lambda *arguments: "1f")
    assert ask("1f", FOUND) == resources.Resources(11, 0, 0, {"mma.sync": 2}, 1, 1, (1.0,), 0, 0)
    assert json.loads((tmp_path / "asked" / "1f").read_text()) == FOUND
    with pytest.raises(RuntimeError, match="compiled"):
        ask(None, FOUND)


def test_one_in_sixteen_is_compared_with_what_is_compiled(ask, monkeypatch):
    found = ask(None, FOUND)
    assert found.registers > 16 and ask(key(), json.loads(json.dumps(found)), compared=1) == found
    with pytest.raises(AssertionError, match="_attention_merge for sm_90 is .*compiled.json says"):
        ask(key(), FOUND, compared=1)


def test_a_key_tells_all_apart_that_compiles_to_something_else(monkeypatch):
    function, constants, config = KERNEL
    others = [key(), key(80), key(element="fp32"), key(kernel=(function, constants | {"D": 128}, config)),
              key(kernel=(function, constants, config._replace(num_warps=8))),
              key(kernel=(parts._attention_bwd_sum, constants, config))]
    monkeypatch.setattr(resources, "get_cache_key", lambda *arguments: "another Triton")
    assert len({*others, key()}) == len(others) + 1
