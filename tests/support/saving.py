"""Ways of a state dict to the disk and back."""

from __future__ import annotations

import copy
import io

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict


def through_file(model, optimizer, model2, optimizer2, tmp_path):
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    model2.load_state_dict(saved["model"])
    optimizer2.load_state_dict(saved["optimizer"])


def through_helpers(model, optimizer, model2, optimizer2, tmp_path, **options):
    options = StateDictOptions(**options)
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    model2.load_state_dict(model.state_dict())
    set_optimizer_state_dict(model2, optimizer2, saved, options=options)


def through_dcp(model, optimizer, model2, optimizer2, tmp_path):
    def state(model, optimizer):
        return {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}

    dcp.save(state(model, optimizer), checkpoint_id=str(tmp_path / "dcp"))
    loaded = state(model2, optimizer2)
    dcp.load(loaded, checkpoint_id=str(tmp_path / "dcp"))
    model2.load_state_dict(loaded["model"])
    set_optimizer_state_dict(model2, optimizer2, loaded["optimizer"])
