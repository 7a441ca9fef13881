"""Exported models: weights of 16 bits that compute as fp32, and the card of the source."""

import pytest
import torch
from small_codecs import save_codec
from small_models import retrain_decoder, save_tokenizer

from bsq_ray import Codec, Tokenizer, model_folder
from bsq_ray.cli import main
from bsq_ray.model_card import CardContent, parse_model_card, render_model_card
from bsq_ray.model_export import export_model
from bsq_ray.model_ids import compute_model_id


@pytest.fixture
def trained(tmp_path):
    """Folder of a tokenizer with averaged weights, raw weights and a card."""
    url = save_tokenizer(tmp_path / "trained", seed=0)
    tokenizer = Tokenizer.from_pretrained(url)
    raw_weights = {name: value + 0.01 for name, value in tokenizer.state_dict().items()}
    tokenizer.save_pretrained(
        url, raw_weights=raw_weights, metrics={"psnr": 21.5}, card_fields={"trained on": "a | b (1234)"}
    )
    return url


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_export_half_model_loads_as_rounded_fp32(trained, tmp_path, dtype):
    exported = export_model(trained, str(tmp_path / "small"), dtype)
    source, loaded = Tokenizer.from_pretrained(trained), Tokenizer.from_pretrained(str(tmp_path / "small"))
    assert loaded.model_id == exported.model_id != source.model_id
    rounded_weights = {name: value.to(getattr(torch, dtype)).float() for name, value in source.state_dict().items()}
    assert all(torch.equal(value, rounded_weights[name]) for name, value in loaded.state_dict().items())
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    size = (tmp_path / "trained" / "model.safetensors").stat().st_size
    assert exported.num_bytes == (tmp_path / "small" / "model.safetensors").stat().st_size < 0.6 * size


def test_export_again_or_as_float32_keeps_id_and_files(trained, tmp_path, photos):
    """The id is that of the values, so a model has one id however it is stored, and reads its files."""
    first = export_model(trained, str(tmp_path / "first"))
    codec = Codec.from_pretrained(str(tmp_path / "first"))
    data = codec.compress(photos[0].resize((70, 50))).data
    for dtype in ("float16", "float32"):
        again = export_model(str(tmp_path / "first"), str(tmp_path / dtype), dtype)
        assert (again.model_id, again.tokens_changed) == (first.model_id, False)
        other = Codec.from_pretrained(str(tmp_path / dtype))
        assert other.compress(photos[0].resize((70, 50))).data == data
        assert other.decompress(data).tobytes() == codec.decompress(data).tobytes()
    Tokenizer.from_pretrained(str(tmp_path / "first")).save_pretrained(str(tmp_path / "saved"))
    assert Tokenizer.from_pretrained(str(tmp_path / "saved")).model_id == first.model_id


def test_model_id_is_that_of_values_not_of_storage():
    weights = {"a": torch.randn(100).half(), "b": torch.arange(3)}
    text = "model: {bits: 4}"
    assert compute_model_id(text, weights) == compute_model_id(text, weights | {"a": weights["a"].float()})
    assert compute_model_id(text, weights) != compute_model_id(text, weights | {"a": weights["a"].bfloat16()})


def test_export_keeps_card_and_adds_fields_and_metrics(trained, tmp_path):
    card = CardContent(fields={"licenses": "CC0", "seeds": "0"}, metrics={"lpips": 0.125}, measured_on="2 photos, fp32")
    exported = export_model(trained, str(tmp_path / "small"), card=card)
    text = (tmp_path / "small" / "README.md").read_text()
    content = parse_model_card(text)
    assert content.fields["trained on"] == "a | b (1234)"
    assert content.fields["licenses"] == "CC0"
    source_id = model_folder.read_model_header(trained).model_id[:12]
    assert content.fields["weights"] == f"float16, rounded from the float32 weights of model {source_id}"
    assert (content.metrics, content.measured_on) == (card.metrics, card.measured_on)
    assert f"`{exported.model_id}`" in text
    export_model(str(tmp_path / "small"), str(tmp_path / "again"))
    assert (tmp_path / "again" / "README.md").read_text() == text


def test_export_without_new_metrics_keeps_those_of_training(trained, tmp_path):
    export_model(trained, str(tmp_path / "small"), card=CardContent(fields={"seeds": "0"}))
    assert parse_model_card((tmp_path / "small" / "README.md").read_text()).metrics == {"psnr": 21.5}


def test_model_card_parsed_is_what_was_rendered(trained):
    run_config = model_folder.load_model_folder_config(trained)
    card = CardContent(fields={"a": "1 | 2", "b": "x"}, metrics={"psnr": 0.0125, "count": 1e9}, measured_on="3. fp32")
    text = render_model_card(run_config, "abc", card.metrics, card.fields, card.measured_on)
    assert parse_model_card(text) == card


def test_export_writes_one_set_of_weights(trained, tmp_path):
    """Averaged weights are not published as raw ones; raw ones are exported on request."""
    export_model(trained, str(tmp_path / "ema"))
    assert sorted(path.name for path in (tmp_path / "ema").iterdir()) == [
        "README.md",
        "config.yaml",
        "model.safetensors",
    ]
    with pytest.raises(ValueError, match="contains no raw weights"):
        Tokenizer.from_pretrained(str(tmp_path / "ema"), weights="raw")
    export_model(trained, str(tmp_path / "raw"), weights="raw")
    raw, ema = (Tokenizer.from_pretrained(str(tmp_path / name)).to_code.bias for name in ("raw", "ema"))
    assert torch.allclose(raw, ema + 0.01, atol=1e-3)
    Tokenizer.from_pretrained(str(tmp_path / "raw"), weights="raw")


def test_export_prior_copies_its_tokenizer_unchanged(tmp_path, photos):
    url = save_codec(tmp_path / "prior")
    export_model(url, str(tmp_path / "small"))
    weights = "tokenizer/model.safetensors"
    assert (tmp_path / "small" / weights).read_bytes() == (tmp_path / "prior" / weights).read_bytes()
    codec = Codec.from_pretrained(str(tmp_path / "small"))
    image = photos[0].resize((40, 30))
    assert codec.decompress(codec.compress(image).data).size == image.size


def test_export_reports_changed_tokens_and_keeps_equal_ones(trained, tmp_path):
    """A retrained decoder of an exported tokenizer keeps the tokens in a second export."""
    first = export_model(trained, str(tmp_path / "first"))
    assert first.tokens_changed
    retrained = retrain_decoder(str(tmp_path / "first"), tmp_path / "retrained")
    second = export_model(retrained, str(tmp_path / "second"))
    assert not second.tokens_changed
    assert Tokenizer.from_pretrained(str(tmp_path / "second")).same_tokens == (first.model_id,)


def test_export_too_large_weight_raises(trained, tmp_path):
    tokenizer = Tokenizer.from_pretrained(trained)
    with torch.no_grad():
        tokenizer.to_code.bias[0] = 1e5
    tokenizer.save_pretrained(trained)
    with pytest.raises(ValueError, match=r"to_code.bias contains values above 65504; choose --dtype bfloat16"):
        export_model(trained, str(tmp_path / "small"))
    export_model(trained, str(tmp_path / "small"), "bfloat16")


def test_export_into_source_raises(trained):
    with pytest.raises(ValueError, match="is the model to export; choose another folder"):
        export_model(trained, trained + "/")


def test_export_command_reads_card_file(trained, tmp_path, capsys):
    (tmp_path / "card.yaml").write_text("fields: {licenses: CC0}\nmetrics: {lpips: 0.125}\nmeasured_on: 2 photos\n")
    out = str(tmp_path / "small")
    with pytest.raises(SystemExit) as exit_:
        main.main(["export", trained, out, "--dtype", "bfloat16", "--card", str(tmp_path / "card.yaml")])
    assert not exit_.value.code
    assert "rounding changed the tokens: tokenize and train" in capsys.readouterr().out
    assert parse_model_card((tmp_path / "small" / "README.md").read_text()).metrics == {"lpips": 0.125}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "int8"], "unknown --dtype int8; choose float16, bfloat16 or float32"),
        (["--card", "card.yaml"], "unknown key metric; did you mean metrics?"),
    ],
    ids=["dtype", "card"],
)
def test_export_command_wrong_input_exits_with_status_2(trained, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "card.yaml").write_text("metric: {lpips: 0.1}\n")
    with pytest.raises(SystemExit) as exit_:
        main.main(["export", trained, "out", *arguments])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_exported_decoder_pixels_stay_close(trained, tmp_path):
    """Rounding the decoder's weights changes pixels by a few levels at most."""
    export_model(trained, str(tmp_path / "small"))
    retrained = Tokenizer.from_pretrained(trained)
    tokens = retrained.encode(torch.zeros(1, 3, 32, 32))
    small = Tokenizer.from_pretrained(str(tmp_path / "small"))
    assert (small.decode(tokens) - retrained.decode(tokens)).abs().max() < 0.02
