import shutil
import signal

import pytest

from cobla_onnx.runtime.temporary import temporary_folder


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
