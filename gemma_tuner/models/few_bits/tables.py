"""The vocabulary's table in few bits: rows are unpacked for ids, blocks of rows for scores.

Embedding and head are one table, the largest matrix of every Gemma but the per-layer table. The
whole of it is never unpacked: not for a batch's ids, not for the scores of a position, not for
what transformers reads of ``embed_tokens.weight`` in passing (the row of its padding).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from gemma_tuner.errors import ConfigError
from gemma_tuner.models.families import family_of_type
from gemma_tuner.models.few_bits.grids import Grid, Packed
from gemma_tuner.models.few_bits.layers import FrozenLinear, PackedLayer, make_parts

MAX_REDUCTION = 32_000
"""The longest inner dimension of a matmul. On M1 and M2 a longer one is summed wrongly by torch
before 2.14, and by batched products still. Source: pytorch issues 193487 and 195163."""


def list_blocks(weight: Tensor | PackedRows) -> Iterator[slice]:
    """Cut the rows of a head, ``[V, H]``, into blocks that are read one at a time."""
    # Of no more rows than the gradient's product may sum over.
    num_rows = weight.shape[0]
    for first in range(0, num_rows, MAX_REDUCTION):
        yield slice(first, min(first + MAX_REDUCTION, num_rows))


class _UnknownUseError(ConfigError, AttributeError):
    """A use of a packed table for which all of it would be unpacked."""


def _refuse(use: str) -> NoReturn:
    raise _UnknownUseError(
        f"{use} needs the whole of the vocabulary's table, which is packed and read by rows "
        "alone; load the checkpoint that it was packed from, or pack it without head_bits"
    )


class PackedRows:
    """What stands for ``weight`` of a packed table: its rows, unpacked as they are indexed."""

    requires_grad = False

    def __init__(self, table: PackedEmbedding) -> None:
        self._table = table
        self.shape = torch.Size((table.num_embeddings, table.embedding_dim))

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""
        return self._table.scales.dtype

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._table.scales.device

    def __getitem__(self, index: Any) -> Tensor:
        """Unpack a row, ``[H]``, or those of a slice; the second index may be ``:``."""
        rows, *columns = index if isinstance(index, tuple) else (index,)
        if isinstance(rows, int | slice) and columns in ([], [slice(None)]):
            if isinstance(rows, int):
                return self._table.read(slice(rows, rows + 1 or None))[0]
            return self._table.read(rows)
        _refuse(f"weight[{', '.join(_name_index(one) for one in (rows, *columns))}]")

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse everything else that a tensor has."""
        _refuse(f"weight.{name}")

    @classmethod
    def __torch_function__(cls, function: Any, *_: object) -> NoReturn:
        """Refuse torch's functions."""
        _refuse(f"{torch.overrides.resolve_name(function) or function}(weight)")


def _take(part: Tensor, rows: slice | Tensor) -> Tensor:
    return part[rows] if isinstance(rows, slice) else part.index_select(0, rows)


def _name_index(index: object) -> str:
    return str(index) if isinstance(index, int | slice | None) else type(index).__name__


class PackedEmbedding(PackedLayer):
    """A scaled embedding that unpacks the rows of its ids."""

    scales: Tensor

    def __init__(self, packed: Packed, grid: Grid, scale: float) -> None:
        super().__init__()
        self.grid = grid
        self.num_embeddings, groups = packed.scales.shape
        self.embedding_dim = groups * grid.group
        self.scale = scale
        self._register("", packed)

    @property
    def weight(self) -> PackedRows:
        """``[V, H]``, of the scales' dtype, without their factor; rows alone can be read."""
        return PackedRows(self)

    def read(self, rows: slice | Tensor) -> Tensor:
        """Unpack rows, ``[rows, H]``; ``rows`` are one slice, or ids."""
        numbers, scales, biases = self._find("")
        few = Packed(
            _take(numbers, rows),
            _take(scales, rows),
            None if biases is None else _take(biases, rows),
        )
        return self.grid.unpack(few, is_traced=self.is_traced)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up ``[...]`` ids."""
        rows = self.read(input_ids.flatten()).unflatten(0, input_ids.shape)
        return rows * torch.tensor(self.scale).to(rows.dtype)

    def extra_repr(self) -> str:
        """Say the shape and the grid."""
        return f"{self.num_embeddings}, {self.embedding_dim}, grid={self.grid}"


class PackedHead(nn.Module):
    """The head of a packed table: scores by blocks of its rows."""

    bias = None

    def __init__(self, table: PackedEmbedding) -> None:
        super().__init__()
        # In a tuple, or the table would be a part of both, with two names for each buffer.
        self._table = (table,)

    @property
    def weight(self) -> PackedRows:
        """``[V, H]``; rows alone can be read."""
        return self._table[0].weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that torch gives it
        """Score ``[..., H]`` against the vocabulary, ``[..., V]``."""
        blocks = (_Block(self.weight, rows) for rows in list_blocks(self.weight))
        scores = [FrozenLinear.apply(input, block.weight, block) for block in blocks]
        return torch.cat(scores, dim=-1)


class _Block:
    """Some rows of a table, as :class:`FrozenLinear` reads them."""

    def __init__(self, table: PackedRows, rows: slice) -> None:
        self._table, self._rows = table, rows

    @property
    def weight(self) -> Tensor:
        return self._table[self._rows]


def name_table(model_type: str) -> str:
    """Name the module of the vocabulary's table, by ``config.model_type``."""
    return f"{family_of_type(model_type).decoder}.embed_tokens"


def replace_table(
    model: Any, grids: Mapping[str, Grid], *, is_filled: bool = True
) -> dict[str, Grid]:
    """Put a packed table in the place of embedding and head, if it is named; return the rest."""
    rest = dict(grids)
    name = name_table(model.config.model_type)
    grid = rest.pop(name, None)
    if grid is not None:
        old = model.get_submodule(name)
        parts = make_parts(old.weight, grid, is_filled=is_filled)
        table = PackedEmbedding(parts, grid, old.scalar_embed_scale)
        model.set_submodule(name, table)
        model.set_output_embeddings(PackedHead(table))
        # They are one by themselves, and there is no parameter to be tied.
        model._tied_weights_keys = model.all_tied_weights_keys = {}  # noqa: SLF001
    return rest
