"""The package: two import names from two folders; tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = next(
    line.split('"')[1]
    for line in (HERE / "lion_fast/__init__.py").read_text(encoding="utf-8").splitlines()
    if line.startswith("__version__")
)
LION_FAST = find_packages(str(HERE), include=["lion_fast", "lion_fast.*"])

# The least versions are what `make versions` runs the tests on
TRAIN = [
    "timm>=1.0.10",
    "torchvision>=0.21",
    "accelerate>=1.2",
    "safetensors>=0.4.4",
    "pillow>=10",
    "numpy>=1.26",
    "onnx>=1.16",
    "pyyaml>=6",
    "tqdm>=4.66",
    "matplotlib>=3.8",
]

EXTRAS = {
    "digits": ["scikit-learn>=1.4"],
    "matlab": ["scipy>=1.11.1"],
    "tensorboard": ["tensorboard>=2.16.2"],
}
# onnxruntime runs the model that weights were converted from, nbclient and ipykernel the notebook
DEV = [
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.5",
    "mypy>=1.11",
    "hypothesis>=6",
    "ruff==0.14.5",
    "setuptools>=70",
    "wheel",
    "onnxruntime>=1.17",
    "nbclient>=0.10",
    "ipykernel>=6.29.3",
]

setup(
    name="lion-fast",
    version=VERSION,
    description="Implicit vision prompt tuning: fast equilibrium layers at the ends of a frozen backbone",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*LION_FAST, "lion_kernels"],
    package_dir={"lion_fast": "lion_fast", "lion_kernels": "kernels/lion_kernels"},
    package_data={
        "lion_fast": ["py.typed", "**/*.json", "data/lists/*.csv"],
        "lion_kernels": ["py.typed", "*.json"],
    },
    install_requires=["torch>=2.6", *TRAIN],
    extras_require={**EXTRAS, "dev": [*DEV, *(need for extra in EXTRAS.values() for need in extra)]},
    entry_points={"console_scripts": ["lion-fast=lion_fast.commands.main:main"]},
    zip_safe=False,
)
