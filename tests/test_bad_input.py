"""What users get wrong, and what they see: one clear line, nothing half-written, and a next run that works."""

from __future__ import annotations

import effc
import pytest
import torch

from .tiny_models import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def program() -> effc.Program:
    return effc.compile(tiny_model("Llama"))


# --- token ids and masks -----------------------------------------------------------------------------------------


def test_ids_of_another_integer_type_give_the_same_logits(program: effc.Program, generator: torch.Generator) -> None:
    ids = torch.randint(0, 97, (2, 7), generator=generator)
    assert torch.equal(program(ids.int()), program(ids))


@pytest.mark.parametrize("hidden", [0.0, False])
def test_masks_of_any_type_hide_where_they_are_zero(program: effc.Program, hidden: float) -> None:
    ids = torch.arange(10).view(2, 5)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    other = mask.bool() if hidden is False else mask * 0.5
    assert torch.equal(program(ids, other), program(ids, mask))


def test_a_padded_row_equals_the_row_alone(generator: torch.Generator) -> None:
    """Also where positions are learned and not relative."""
    program = effc.compile(tiny_model("GPT2"))
    ids = torch.randint(3, 97, (2, 9), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    torch.testing.assert_close(program(ids, mask)[:1, 4:], program(ids[:1, 4:]), rtol=1e-4, atol=1e-4)


def test_a_buffer_of_the_wrong_type_never_reaches_a_kernel(program: effc.Program) -> None:
    ids = torch.ones(1, 3, dtype=torch.int32)
    with pytest.raises(effc.InputError, match=r"input_ids must be torch\.int64, found torch\.int32"):
        program.run("forward", {"input_ids": ids, "position_ids": ids.long()}, {}, False)


# --- torch.compile -----------------------------------------------------------------------------------------------


def test_a_graph_that_is_refused_runs_eagerly_and_is_listed() -> None:
    @torch.compile(backend="effc", fullgraph=True)
    def table() -> torch.Tensor:
        return torch.arange(4) * 2

    with pytest.warns(UserWarning, match="runs in eager PyTorch: .*it has no tensors among its inputs"):
        assert table().tolist() == [0, 2, 4, 6]
    assert "runs in eager PyTorch" in str(effc.explain())
