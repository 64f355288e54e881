"""Two streams through layers that hand something on in a dictionary: neither reads what the other has written."""

import pytest
import torch
from torch import nn

from wanda_lightning.calibration.calls import Arguments
from wanda_lightning.calibration.dense_stream import DenseStream
from wanda_lightning.calibration.dry_run import Recorded
from wanda_lightning.calibration.hidden_states import HiddenStates
from wanda_lightning.model.decoder import DecoderLayer


class Writes(nn.Module):
    factor = 3

    def forward(self, hidden, notes):
        notes["seen"] = self.factor * hidden
        return hidden + 1


class Reads(nn.Module):
    def forward(self, hidden, notes):
        return hidden + notes["seen"]


@pytest.mark.parametrize("call", [lambda notes: Arguments((notes,), {}), lambda notes: Arguments((), {"notes": notes})])
def test_what_the_pruned_layers_write_is_not_read_in_the_dense_stream(call):
    layers, notes, hidden = [Writes(), Reads()], {}, torch.randn(2, 4, 8)
    entering = HiddenStates()
    entering.append(hidden)
    dense = DenseStream(Recorded(entering, [[call(notes)], [call(notes)]], []).twin())
    dense.advance(DecoderLayer("0", layers[0], [], {}))
    assert not notes
    layers[0].factor = 0  # pruned
    call(notes).call(layers[0], hidden)
    dense.advance(DecoderLayer("1", layers[1], [], {}))
    torch.testing.assert_close(dense.hidden_BTD[0], hidden + 1 + 3 * hidden)
