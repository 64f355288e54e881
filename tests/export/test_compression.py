"""A model without its zeros: the same bits again, and smaller where that is possible."""

import json
import struct
from pathlib import Path

import pytest
import torch
from helpers import digests, mixtral, tiny_llama, token_batches
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from wanda_lightning import Magnitude, SemiStructured, Unstructured, prune_model
from wanda_lightning.checkpoints.tensor_files import opened, weight_files
from wanda_lightning.cli.compress import compress_command, decompress_command
from wanda_lightning.export.bitmask import CHECKSUM, HEADER, compress_file
from wanda_lightning.export.compression import compress, decompress, load_compressed
from wanda_lightning.export.size import CompressedSize, compressed_size
from wanda_lightning.model.decoder import decoder_layers


def pruned(folder: Path, dtype=torch.float32, pattern=Unstructured(0.5), **save) -> Path:  # noqa: B008 (frozen)
    model = tiny_llama(tie_word_embeddings=True)
    model.generation_config.max_new_tokens = 77  # by no default
    prune_model(model, None, Magnitude(), pattern)
    model.to(dtype).save_pretrained(folder, **save)
    return folder


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and a[name].shape == b[name].shape
        and a[name].contiguous().flatten().view(torch.uint8).equal(b[name].contiguous().flatten().view(torch.uint8))
        for name in a
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.02, 0.5, 0.9])
def test_the_size_is_known_before(tmp_path, dtype, sparsity):
    """Calculated of the dense model, measured of the saved one, and written."""
    model = tiny_llama(tie_word_embeddings=True).to(dtype)
    model.register_buffer("decay", torch.ones(999, dtype=dtype))  # such as MiniMax's
    model.register_buffer("made_anew", torch.ones(999), persistent=False)
    linears = [linear for layer in decoder_layers(model) for linear in layer.linears]
    expected = CompressedSize(model).expected((linear, Unstructured(sparsity)) for linear in linears)
    prune_model(model, token_batches(1), "wanda", sparsity)
    model.save_pretrained(tmp_path / "model")
    assert compressed_size(tmp_path / "model") == expected
    assert compress(str(tmp_path / "model"), str(tmp_path / "small")).written == expected


def test_the_size_of_a_model_that_has_more_zeros_already_is_known_before(tmp_path):
    model = tiny_llama()
    prune_model(model, token_batches(1), "wanda", 0.7)
    linears = [linear for layer in decoder_layers(model) for linear in layer.linears]
    expected = CompressedSize(model).expected((linear, Unstructured(0.5)) for linear in linears)
    prune_model(model, token_batches(1), "wanda", 0.5)
    model.save_pretrained(tmp_path)
    assert compressed_size(tmp_path) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip_of_a_folder(tmp_path, dtype):
    folder = pruned(tmp_path / "model", dtype, max_shard_size="20KB")
    sizes = compress(str(folder), str(tmp_path / "small"))
    decompress(str(tmp_path / "small"), str(tmp_path / "again"))
    assert sizes.written < sizes.read
    assert sum(1 for _ in folder.glob("*.safetensors")) > 2
    names = {file.name for file in folder.iterdir()}
    assert {file.name for file in (tmp_path / "again").iterdir()} == names
    for name in names:
        before, after = folder / name, tmp_path / "again" / name
        if name.endswith(".safetensors"):
            assert same_bits(load_file(before), load_file(after))
            with opened(before) as a, opened(after) as b:
                assert a.metadata() == b.metadata()
        else:
            assert before.read_bytes() == after.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loaded_model_is_the_same(tmp_path, dtype, batches):
    folder = pruned(tmp_path / "model", dtype, SemiStructured(2, 4))
    compress(str(folder), str(tmp_path / "small"))
    expected, loaded = AutoModelForCausalLM.from_pretrained(folder), load_compressed(str(tmp_path / "small"))
    assert type(loaded) is type(expected)
    assert loaded.dtype == expected.dtype == dtype
    assert not loaded.training
    assert loaded.generation_config.to_dict() == expected.generation_config.to_dict()
    assert loaded.config.name_or_path == loaded.name_or_path == str(tmp_path / "small")
    assert same_bits(expected.state_dict(), loaded.state_dict())
    with torch.no_grad():
        assert torch.equal(loaded(batches[0]).logits, expected(batches[0]).logits)
    assert load_compressed(str(tmp_path / "small"), dtype=torch.float16).dtype == torch.float16
    (tmp_path / "small" / "generation_config.json").unlink()  # as of models that say nothing of it
    assert load_compressed(str(tmp_path / "small")).generation_config.max_new_tokens != 77


def test_a_mixture_of_experts_is_loaded_too(tmp_path, batches):
    model = mixtral()  # its experts are stored one by one, and fused when they are loaded
    prune_model(model, None, Magnitude(), Unstructured(0.5))
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    compress(str(tmp_path / "model"), str(tmp_path / "small"))
    assert same_bits(load_compressed(str(tmp_path / "small")).state_dict(), model.state_dict())


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own_llama"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own_is_loaded_if_that_is_trusted(tmp_path):
    folder = pruned(tmp_path / "model")
    (folder / "own.py").write_text(CODE)
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own_llama", "auto_map": own}))
    compress(folder, tmp_path / "small")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load_compressed(tmp_path / "small")
    assert type(load_compressed(tmp_path / "small", trust_remote_code=True)).__name__ == "OwnForCausalLM"


def test_what_is_stored(tmp_path):
    """The file as any reader of safetensors sees it: a bit a weight and the values, aligned; the rest as it was."""
    folder = pruned(tmp_path / "model", pattern=SemiStructured(1, 4))
    compress(str(folder), str(tmp_path / "small"))
    stored = load_file(tmp_path / "small/model.compressed.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weight = load_file(folder / "model.safetensors")[name].flatten()
    assert name not in stored
    assert torch.equal(stored[f"{name}.values"], weight[weight != 0])
    bits = [int(bit) for byte in stored[f"{name}.bitmask"].tolist() for bit in f"{byte:08b}"]
    assert bits == (weight != 0).int().tolist()
    assert "model.embed_tokens.weight" in stored  # has no zeros: stays as it is
    assert "wanda-lightning decompress FOLDER OUTPUT" in (tmp_path / "small/COMPRESSED.md").read_text()


def header_of(file: Path) -> dict[str, dict]:
    """The header of a safetensors file as its specification says."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    assert length % 8 == 0
    header = json.loads(content[8 : 8 + length])
    header.pop("__metadata__")
    return header


def folder_of(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return str(path)


def test_every_bit_and_every_shape_comes_back(tmp_path):
    generator = torch.Generator().manual_seed(0)
    odd = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool):
        for shape in ((7, 9), (3, 5, 11), (65,), (1,), (), (0, 4)):
            kept = torch.rand(shape, generator=generator) < 0.2
            odd[f"{dtype}{shape}"] = (torch.randn(shape, generator=generator) * 50 * kept).to(dtype)
    special = torch.zeros(64, 64)
    special[0, :5] = torch.tensor([-0.0, float("nan"), float("inf"), 1e-45, -float("inf")])
    special.view(torch.int32)[1, 0] = 0x7FC12345  # a NaN with a payload
    special.view(torch.int32)[1, 1] = -1  # and one with a sign
    odd |= {"special": special, "special16": special.bfloat16(), "zeros": torch.zeros(40, 3)}
    source = folder_of(tmp_path / "model", odd)
    compress(source, str(tmp_path / "small"))
    decompress(str(tmp_path / "small"), str(tmp_path / "again"))
    assert same_bits(load_file(tmp_path / "model/model.safetensors"), load_file(tmp_path / "again/model.safetensors"))
    stored = load_file(tmp_path / "small/model.compressed.safetensors")
    for name, entry in header_of(tmp_path / "small/model.compressed.safetensors").items():
        assert entry["data_offsets"][0] % stored[name].element_size() == 0, f"{name} is not aligned"
    assert len(stored["special.values"]) == 6
    assert stored["special.zero_signs"].sum() == 128  # one bit: that of -0.0, the first of the zeros


def test_weights_that_were_multiplied_by_a_mask(tmp_path):
    """Half of their zeros are -0.0: they cost a bit each, not a value."""
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    masked = weight * (torch.arange(64) % 4 == 0)
    assert int(masked.view(torch.int32).count_nonzero()) > 64 * 64 // 2
    source = folder_of(tmp_path / "model", {"w": masked, "plain": masked + 0.0})
    compress(source, str(tmp_path / "small"))
    stored = load_file(tmp_path / "small/model.compressed.safetensors")
    assert len(stored["w.values"]) == len(stored["plain.values"]) == 64 * 16
    assert stored["w.zero_signs"].nbytes == 64 * 48 / 8
    assert "plain.zero_signs" not in stored
    decompress(str(tmp_path / "small"), str(tmp_path / "again"))
    assert same_bits(load_file(tmp_path / "model/model.safetensors"), load_file(tmp_path / "again/model.safetensors"))


def test_only_what_gets_smaller_is_compressed(tmp_path):
    def stored(zeros: int) -> set[str]:
        """Names in the file for 64 bfloat16 weights: 128 bytes, of which a mask would take 8."""
        weight = torch.ones(64, dtype=torch.bfloat16)
        weight[:zeros] = 0
        compress(folder_of(tmp_path / f"{zeros}", {"w": weight}), str(tmp_path / f"{zeros}-small"))
        return set(load_file(tmp_path / f"{zeros}-small/model.compressed.safetensors"))

    assert stored(4) == {"w"}
    assert stored(5) == {"w.values", "w.bitmask"}


def test_signs_of_zeros_count_where_it_is_asked_what_gets_smaller(tmp_path):
    weight = torch.ones(64, dtype=torch.bfloat16)
    weight[:7] = -0.0  # 57 values, a mask and signs, of 8 bytes each, would be 130 bytes in place of 128
    save_file({"w": weight}, tmp_path / "model.safetensors")  # as other programs write it, without metadata
    compress_file(tmp_path / "model.safetensors", tmp_path / "small.safetensors")
    assert [*load_file(tmp_path / "small.safetensors")] == ["w"]


def test_transformers_does_not_take_it_for_an_ordinary_model(tmp_path):
    compress(str(pruned(tmp_path / "model")), str(tmp_path / "small"))
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "small")


def test_mistakes_are_explained(tmp_path):
    folder = str(pruned(tmp_path / "model"))
    with pytest.raises(ValueError, match="no such folder"):
        compress(str(tmp_path / "nowhere"), str(tmp_path / "small"))
    with pytest.raises(ValueError, match="exists already"):
        compress(folder, folder)
    with pytest.raises(ValueError, match=r"model/small lies in .*model, and would be copied into itself"):
        compress(folder, f"{folder}/small")
    with pytest.raises(ValueError, match="is no compressed model"):
        decompress(folder, str(tmp_path / "again"))
    with pytest.raises(ValueError, match="is no compressed model"):
        load_compressed(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no weights"):
        compress(str(tmp_path / "empty"), str(tmp_path / "small"))
    clash = folder_of(tmp_path / "clash", {"w": torch.zeros(99), "w.values": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"names that compression would give to parts of \{'w'\}"):
        compress(clash, str(tmp_path / "small"))
    file = Path(folder) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors is cut off"):
        compress(folder, str(tmp_path / "small"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clash", "empty", "model"]  # nothing half done


@pytest.mark.parametrize(("here", "output"), [(".", "model/small"), ("model", "small"), ("model", "../model/small")])
def test_an_output_in_the_model_is_refused_by_any_name(tmp_path, monkeypatch, here, output):
    folder = folder_of(tmp_path / "model", {"w": torch.eye(16)})
    monkeypatch.chdir(tmp_path / here)
    with pytest.raises(ValueError, match="would be copied into itself"):
        compress(folder, output)


def damaged(tmp_path: Path, at: int) -> Path:
    """A compressed identity matrix, in which the last bit of a byte behind the header is another one."""
    compress(folder_of(tmp_path / "model", {"w": torch.eye(16)}), str(tmp_path / "small"))
    file = tmp_path / "small/model.compressed.safetensors"
    content = bytearray(file.read_bytes())
    content[8 + struct.unpack("<Q", content[:8])[0] + at] ^= 1
    file.write_bytes(content)
    return tmp_path / "small"


@pytest.mark.parametrize("at", [0, 16 * 4, -1], ids=["a value", "the first of the mask", "the last of the mask"])
@pytest.mark.parametrize("read", [load_compressed, lambda folder: decompress(folder, folder.parent / "again")])
def test_damage_is_noticed(tmp_path, at, read):
    folder = damaged(tmp_path, at % (16 * 4 + 16 * 16 // 8))
    tiny_llama().config.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"model\.compressed\.safetensors is damaged, its checksum is another one"):
        read(folder)


@pytest.mark.parametrize(
    ("before", "after"), [(b'"model.norm.weight"', b'"model.nosm.weight"'), (b'.compressed"', b'.comqressed"')]
)
def test_damage_to_the_header_is_noticed(tmp_path, before, after):
    """Another name would be as good for a reader, and the weight missing."""
    compress(pruned(tmp_path / "model"), tmp_path / "small")
    file = tmp_path / "small/model.compressed.safetensors"
    file.write_bytes(file.read_bytes().replace(before, after))
    with pytest.raises(ValueError, match=r"model\.compressed\.safetensors is damaged, its checksum is another one"):
        load_compressed(tmp_path / "small")


def test_a_file_of_the_same_name_that_is_another_s(tmp_path):
    (tmp_path / "model").mkdir()
    save_file({"w": torch.zeros(3)}, tmp_path / "model/model.compressed.safetensors")
    with pytest.raises(ValueError, match="was not written by wanda-lightning compress"):
        decompress(tmp_path / "model", tmp_path / "again")


def test_a_file_without_a_checksum_is_read(tmp_path):
    folder = pruned(tmp_path / "model")
    compress(folder, tmp_path / "small")
    without_checksum(tmp_path / "small")
    decompress(tmp_path / "small", tmp_path / "again")
    assert digests(tmp_path / "again") == digests(folder)


def test_a_mask_that_does_not_fit_is_noticed_without_a_checksum(tmp_path):
    folder = damaged(tmp_path, 16 * 4)
    without_checksum(folder)
    with pytest.raises(ValueError, match="compressed tensor w is damaged"):
        decompress(folder, tmp_path / "again")


def without_checksum(folder: Path) -> None:
    file = folder / "model.compressed.safetensors"
    with opened(file) as tensors:
        metadata = {key: value for key, value in tensors.metadata().items() if key not in (CHECKSUM, HEADER)}
    save_file(load_file(file), file, metadata)


def test_shards_that_are_missing_or_elsewhere(tmp_path):
    folder = pruned(tmp_path / "model", max_shard_size="20KB")
    assert weight_files(folder) == sorted(folder.glob("*.safetensors"))
    lost = sorted(folder.glob("*.safetensors"))[1]
    lost.unlink()
    with pytest.raises(ValueError, match=rf"lacks 1 of the \d+ weight files .*{lost.name}"):
        weight_files(folder)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="names files outside its folder"):
        weight_files(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ValueError, match="is no index of weights"):
        weight_files(folder)


def test_an_index_that_an_earlier_save_left_does_not_count(tmp_path):
    """transformers leaves it there, and loads the one file."""
    pruned(tmp_path / "model", max_shard_size="20KB")
    folder = pruned(tmp_path / "model")
    assert (folder / "model.safetensors.index.json").is_file()
    assert weight_files(folder) == [folder / "model.safetensors"]
    compress(folder, tmp_path / "small")
    decompress(tmp_path / "small", tmp_path / "again")
    assert digests(tmp_path / "again") == digests(folder)


def test_several_compressed_files_are_told_from_ordinary_ones(tmp_path):
    folder = pruned(tmp_path / "model", max_shard_size="20KB")
    compress(folder, tmp_path / "small")
    assert weight_files(tmp_path / "small") == []
    with pytest.raises(ValueError, match="is no compressed model"):
        decompress(folder, tmp_path / "again")


def test_the_folder_of_a_run(tmp_path):
    pruned(tmp_path / "run/model")
    assert compress(tmp_path / "run", tmp_path / "small") == compress(tmp_path / "run/model", tmp_path / "same")


def test_folders_of_the_user_s_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = pruned(tmp_path / "model")
    compress("~/model", "~/small")
    decompress("~/small", "~/again")
    assert digests(tmp_path / "again") == digests(folder)
    assert load_compressed("~/small").lm_head.weight.shape == (300, 32)
    with pytest.raises(ValueError, match="exists already"):
        compress("~/model", "~/small")


def test_the_commands(tmp_path, capsys):
    folder = pruned(tmp_path / "model")
    compress_command([str(folder), str(tmp_path / "small")])
    size = (tmp_path / "small/model.compressed.safetensors").stat().st_size
    before = (folder / "model.safetensors").stat().st_size
    assert f"({size / before:.3f})" in capsys.readouterr().out
    decompress_command([str(tmp_path / "small"), str(tmp_path / "again")])
    assert same_bits(load_file(folder / "model.safetensors"), load_file(tmp_path / "again/model.safetensors"))
