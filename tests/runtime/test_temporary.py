import shutil
import signal

import numpy as np
import pytest

from cobla_onnx.runtime.temporary import Shelf, owned, temporary_folder


def test_what_a_shelf_keeps_holds_no_other_memory():
    whole = np.zeros((1000, 8))
    shelf = Shelf([{"x": whole[:2], "words": np.array(["a"])}])
    assert all(array.base is None for array in shelf[0].values())
    np.testing.assert_array_equal(shelf[0]["x"], whole[:2])


def test_values_that_are_no_arrays_stay_as_they_are():
    own, sequence = np.ones(3), [np.ones(2)]
    kept = owned({"own": own, "sequence": sequence})
    assert kept["own"] is own
    assert kept["sequence"] is sequence


def test_a_temporary_folder_goes_with_an_error():
    with pytest.raises(FileNotFoundError), temporary_folder("test") as folder:
        (folder / "absent" / "file").touch()
    assert not folder.exists()


def test_an_interrupt_waits_until_a_temporary_folder_is_gone(monkeypatch):
    remove = shutil.rmtree

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        remove(*args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", interrupted)
    with pytest.raises(KeyboardInterrupt), temporary_folder("test") as folder:
        (folder / "file").touch()
    assert not folder.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
