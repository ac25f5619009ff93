"""What the tests of the network share."""

import pytest
import torch

from ernie_serve.kernels.layout import Layout, Span


@pytest.fixture(scope="session")
def logits_of():
    return _logits_of


def _logits_of(model, ids, positions=None, rows=None):
    """One prompt in one pass through one block that holds it all."""
    length, config = len(ids), model.config
    layout = Layout(
        positions=torch.arange(length) if positions is None else positions,
        slots=torch.arange(length),
        block_tables=torch.zeros(1, 1, dtype=torch.int32),
        query_starts=torch.tensor([0, length], dtype=torch.int32),
        context_lens=torch.tensor([length], dtype=torch.int32),
        spans=(Span(0, length, length),),
        block_size=length,
    )
    dtype = model.norm.weight.dtype
    cache = [
        model.kernels.empty_cache(1, length, config.num_key_value_heads, config.head_dim, dtype, torch.device("cpu"))
        for _ in range(config.num_hidden_layers)
    ]
    return model(ids, layout, cache, torch.arange(length) if rows is None else rows)


@pytest.fixture(scope="session")
def packable_checkpoint(packable_layouts):
    """A `-PT` folder of the 21B's shape whose matrices can be packed."""
    return packable_layouts[0]


@pytest.fixture(scope="session")
def packable_layouts(make_checkpoint):
    """The same numbers as `-PT`, as `-PT` in several shards, and as `-Paddle`."""
    return [
        make_checkpoint("packable"),
        make_checkpoint("packable", shard_size="100KB"),
        make_checkpoint("packable", layout="paddle"),
    ]
