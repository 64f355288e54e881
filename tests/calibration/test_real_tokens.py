"""Which mask belongs to what enters a layer, by its shape."""

import torch

from wanda_lightning.calibration.real_tokens import RealTokens, real_tokens


def test_a_mask_lies_as_its_tokens_do_also_where_these_come_first():
    mask_BT = torch.tensor([[True, True, True], [True, False, False]])
    for hidden, expected in ((torch.ones(2, 3, 4), mask_BT), (torch.ones(3, 2, 4), mask_BT.t())):
        found = real_tokens({"attention_mask": mask_BT}, hidden, {}).mask_BT
        assert found is not None
        assert torch.equal(found, expected)
    assert real_tokens({"attention_mask": mask_BT}, torch.ones(5, 3, 4), {}).mask_BT is None


def test_a_copy_of_what_an_encoder_gives_has_its_mask():
    """Such as accelerate's hooks make for a layer that is on another device than the encoder."""
    encoded, mask = torch.randn(2, 4, 8), torch.ones(2, 4, dtype=torch.bool)
    assert RealTokens(None, ((encoded, mask),)).of(encoded.clone()) is mask
