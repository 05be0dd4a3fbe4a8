from pathlib import Path
from typing import Any

import pytest
import tiny
from engines import Built, export_and_build
from toy_engine import VOCAB, ToyWeights, write_graph

from v4graph.checkpoint.init import init
from v4graph_export import ExportOptions
from v4graph_runtime import Tokenizer, build_engine


class Letters:
    """The tokens of the toy engine: <bos>, <eos> and 21 letters."""

    def encode(self, text: str, *, add_special_tokens: bool) -> Any:
        del add_special_tokens
        return type("Encoding", (), {"ids": [ord(letter) - ord("a") + 2 for letter in text]})

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return "".join(chr(ord("a") + i - 2) for i in ids if i > 1)

    def get_vocab_size(self, *, with_added_tokens: bool) -> int:
        assert with_added_tokens
        return VOCAB


@pytest.fixture(scope="session")
def weights() -> ToyWeights:
    return ToyWeights.random()


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine with the logits of each slot's last token."""
    folder = tmp_path_factory.mktemp("toy")
    build_engine(write_graph(folder / "graph"), folder / "engine")
    return folder / "engine"


@pytest.fixture(scope="session")
def all_logits_engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy_all_logits")
    build_engine(write_graph(folder / "graph", all_logits=True), folder / "engine")
    return folder / "engine"


@pytest.fixture(scope="session")
def byte_tokenizer() -> Tokenizer:
    """One token per byte, so that most characters take several: the hardest case for streaming."""
    from tokenizers import Tokenizer as Core
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Core(models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<bos>", "<eos>"])
    return Tokenizer(core, bos_id=0)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(Letters(), bos_id=0)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def official(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """The tiny model in v4 numerics, with a random checkpoint in the official format."""
    folder = tmp_path_factory.mktemp("official")
    init(tiny.config(), folder / "checkpoint", 1)
    engine = export_and_build(folder, folder / "checkpoint", ExportOptions(max_seq_len=128))
    return Built(engine, folder / "checkpoint")
