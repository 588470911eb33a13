import pytest
from image_helpers import class_folders


@pytest.fixture
def three(tmp_path):
    """20, 10 and 5 images of three classes."""
    return class_folders(tmp_path / "photos", {"cat": 20, "dog": 10, "eel": 5})
