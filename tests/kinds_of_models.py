"""Tiny random models of every kind that somebody trains with Lightning, each with two batches that it takes.

Built by their classes; nothing is loaded. Those of packages that may not be there skip, with the reason.
"""

from importlib import import_module

import pytest
import torch
from torch import nn

SIZE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGES = {"image_size": 16, "patch_size": 4}


def _random(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _tokens(*shape, seed=1):
    return torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(seed))


def _mask(length):
    mask = torch.ones(2, length, dtype=torch.long)
    mask[1, length - 3 :] = 0
    return mask


def _text(seed):
    return {"input_ids": _tokens(2, 9, seed=seed), "attention_mask": _mask(9)}


def _images(seed):
    return {"pixel_values": _random(2, 3, 16, 16, seed=seed), "labels": torch.tensor([0, 1])}


def _imported(package):
    try:
        return import_module(package)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision is built for one torch only
        return pytest.skip(f"{package} cannot be imported: {error}")


def bert():
    from transformers import BertConfig, BertForSequenceClassification

    batches = [
        {**_text(seed), "token_type_ids": _tokens(2, 9, seed=seed) % 2, "labels": torch.tensor([0, 1])}
        for seed in (1, 2)
    ]
    return BertForSequenceClassification(BertConfig(vocab_size=100, **SIZE)), batches


def deberta():
    """An encoder that nowhere says that it is none of a language model."""
    from transformers import DebertaV2Config, DebertaV2ForSequenceClassification

    batches = [{**_text(seed), "token_type_ids": _tokens(2, 9, seed=seed) % 2} for seed in (1, 2)]
    return DebertaV2ForSequenceClassification(DebertaV2Config(vocab_size=100, type_vocab_size=2, **SIZE)), batches


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config), [{**_text(s), "labels": _tokens(2, 6, seed=s + 5)} for s in (1, 2)]


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32,
    )  # fmt: skip
    batches = [  # as many tokens are written as are read, and others of them are padding
        {**_text(s), "decoder_input_ids": _tokens(2, 9, seed=s + 5), "decoder_attention_mask": _mask(9).flip(0)}
        for s in (1, 2)
    ]
    return BartForConditionalGeneration(config), batches


def whisper():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, d_model=32,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, num_mel_bins=8, max_source_positions=10, suppress_tokens=None, begin_suppress_tokens=None,
    )  # fmt: skip
    batches = [{"input_features": _random(2, 8, 20, seed=s), "labels": _tokens(2, 6, seed=s)} for s in (1, 2)]
    return WhisperForConditionalGeneration(config), batches


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**SIZE, **IMAGES)), [_images(1), _images(2)]


def swin():
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4)
    return SwinForImageClassification(config), [_images(1), _images(2)]


def convnext():
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, image_size=16)
    return ConvNextForImageClassification(config), [_images(1), _images(2)]


def clip():
    from transformers import CLIPConfig, CLIPModel

    text = {**SIZE, "vocab_size": 100, "eos_token_id": 99, "bos_token_id": 98, "max_position_embeddings": 16}
    config = CLIPConfig(text_config=text, vision_config={**SIZE, **IMAGES}, projection_dim=16)
    return CLIPModel(config), [{**_text(s), "pixel_values": _random(2, 3, 16, 16, seed=s)} for s in (1, 2)]


def wav2vec2():
    from transformers import Wav2Vec2Config, Wav2Vec2ForCTC

    config = Wav2Vec2Config(
        **SIZE, vocab_size=40, conv_dim=[16, 16], conv_kernel=[3, 3], conv_stride=[2, 2], num_feat_extract_layers=2,
        num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return Wav2Vec2ForCTC(config), [{"input_values": _random(2, 200, seed=s)} for s in (1, 2)]


def timm_vit():
    model = _imported("timm").create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=4
    )
    return model, [_random(2, 3, 16, 16, seed=s) for s in (1, 2)]


def torchvision_vit():
    model = _imported("torchvision").models.VisionTransformer(16, 4, 2, 2, 32, 64, num_classes=4)
    return model, [(_random(2, 3, 16, 16, seed=s), torch.tensor([0, 1])) for s in (1, 2)]


class Tagger(nn.Module):
    """A plain ``nn.TransformerEncoder`` between an embedding and a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)

    def forward(self, tokens, key_padding_mask=None):
        return self.head(self.encoder(self.embed(tokens), src_key_padding_mask=key_padding_mask))


def transformer_encoder():
    return Tagger(), [{"tokens": _tokens(2, 9, seed=s), "key_padding_mask": _mask(9) == 0} for s in (1, 2)]


class Translator(nn.Module):
    """A plain ``nn.Transformer``, which takes tokens first and batch second."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 32)
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64), 2, enable_nested_tensor=False)
        self.transformer = nn.Transformer(32, 2, 2, 2, 64, custom_encoder=encoder)

    def forward(self, src, tgt, src_key_padding_mask=None):
        return self.transformer(
            self.embed(src.t()),
            self.embed(tgt.t()),
            src_key_padding_mask=src_key_padding_mask,
            memory_key_padding_mask=src_key_padding_mask,
        )


def transformer():
    batches = [
        {"src": _tokens(2, 9, seed=s), "tgt": _tokens(2, 6, seed=s), "src_key_padding_mask": _mask(9) == 0}
        for s in (1, 2)
    ]
    return Translator(), batches


class ByKeyword(nn.Module):
    """A layer whose hidden states have a name of its own, behind another tensor."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, scale, *, x):
        return [x + scale * self.down(torch.tanh(self.up(x))), "and more"]


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([ByKeyword() for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x=x, scale=0.5)[0]
        return x


def keywords():
    return Keywords(), [_random(2, 5, 16, seed=s) for s in (1, 2)]


STACKS = {
    bert: ["bert.encoder.layer"],
    deberta: ["deberta.encoder.layer"],
    t5: ["encoder.block", "decoder.block"],
    bart: ["model.encoder.layers", "model.decoder.layers"],
    whisper: ["model.encoder.layers", "model.decoder.layers"],
    vit: ["vit.layers"],
    swin: ["swin.encoder.layers.0.blocks", "swin.encoder.layers.1.blocks"],
    convnext: ["convnext.encoder.stages.0.layers", "convnext.encoder.stages.1.layers"],
    clip: ["vision_model.encoder.layers", "text_model.encoder.layers"],
    wav2vec2: ["wav2vec2.encoder.layers"],
    timm_vit: ["blocks"],
    torchvision_vit: ["encoder.layers"],
    transformer_encoder: ["encoder.layers"],
    transformer: ["transformer.encoder.layers", "transformer.decoder.layers"],
    keywords: ["blocks"],
}
"""What builds each model, and its lists of layers in the order of their calls."""


def build(kind):
    torch.manual_seed(0)
    model, batches = kind()
    for parameter in model.parameters():  # some are initialised so small that layers change nothing
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.eval(), batches
