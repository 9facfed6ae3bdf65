"""Which place each published name gets: plain modules by their own names, others by what they say themselves."""

import torch
from comfyui_hywu.hywu_core.checkpoint import slots
from torch import nn


class Experts(nn.Module):
    """Two experts stacked in one parameter; published one by one."""

    def __init__(self):
        super().__init__()
        self.weight_EFD = nn.Parameter(torch.zeros(2, 3, 4))
        self.inner = nn.Linear(2, 2)  # its names are not published

    def checkpoint_slots(self):
        return {f"{expert}.up.weight": self.weight_EFD[expert] for expert in range(2)}


def test_parameters_and_persistent_buffers_by_name():
    module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    module.register_buffer("table", torch.zeros(1), persistent=False)
    module.register_parameter("absent", None)
    assert set(slots(module)) == set(module.state_dict())
    assert slots(module)["0.weight"] is module[0].weight


def test_a_module_answers_for_its_whole_subtree_with_views():
    module = nn.ModuleDict({"experts": Experts(), "gate": nn.Linear(4, 2, bias=False)})
    places = slots(module)
    assert list(places) == ["experts.0.up.weight", "experts.1.up.weight", "gate.weight"]
    with torch.no_grad():
        places["experts.1.up.weight"].fill_(7.0)
    assert module["experts"].weight_EFD[:, 0, 0].tolist() == [0.0, 7.0]


def test_it_works_on_meta():
    with torch.device("meta"):
        places = slots(Experts())
    assert {name: tuple(place.shape) for name, place in places.items()} == {"0.up.weight": (3, 4), "1.up.weight": (3, 4)}


def test_a_shared_parameter_has_both_names():
    module = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    module["b"].weight = module["a"].weight
    assert set(slots(module)) == {"a.weight", "b.weight"}
