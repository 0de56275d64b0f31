"""Graphs that several tests look at, exported once."""

import pytest
import torch
from networks import build

from infoprune_export.graph.export import export_graphs
from infoprune_export.models.families import find_anatomy

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """A random CLIP + Llama model, its anatomy and the directory of its fp32 graphs."""
    model = build()
    anatomy = find_anatomy(model)
    directory = tmp_path_factory.mktemp("graphs")
    export_graphs(model, anatomy, directory)
    return model, anatomy, directory
