"""What all tests share: no test reads or writes the user's own cache or the repository's store by accident."""

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("shared-cores", deadline=None)  # how long an example takes says nothing here
hypothesis.settings.load_profile("shared-cores")

torch.set_num_threads(1)  # what the sweeps use; results depend on it


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDCOMP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CONDCOMP_QUICK_STORE", str(tmp_path / "quick"))
    monkeypatch.setenv("CONDCOMP_FIGURES", str(tmp_path / "figures"))
    monkeypatch.delenv("CONDCOMP_STORE", raising=False)  # the committed runs: tests read them, none computes into them
