"""Packaging of ds_sparkling. Exact versions for a reproducible environment are in constraints.txt."""

from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
version = next(
    line.split('"')[1] for line in (here / "ds_sparkling/__init__.py").read_text().splitlines() if "__version__" in line
)
plots = ["matplotlib>=3.8"]
# 5.23 breaks inside DeepSpeed 0.19.8's AutoEP.
hf = ["transformers>=5.9,<5.23", "safetensors>=0.4", "accelerate>=1.15,<2"]
docs = ["mkdocs-material>=9.5", "mkdocstrings[python]>=0.26"]
# scipy: Student's t of the experiments under tools/.
tests = ["pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "scipy>=1.11"]

setup(
    name="ds-sparkling",
    version=version,
    description="Widen a mixture-of-experts model in the middle of DeepSpeed training (SPARKLING)",
    long_description=(here / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["ds_sparkling", "ds_sparkling.*"]),
    package_data={"ds_sparkling": ["py.typed", "optim/*.cpp"]},
    install_requires=[
        "torch>=2.6,<2.15",
        "deepspeed==0.19.8",  # growth reaches into its internals, which are checked version by version
        "numpy>=1.26",
        "pydantic>=2.9,<3",
        "filelock>=3.12",
        "tensorboard>=2.15",
        "tqdm>=4.60",
    ],
    extras_require={
        "plots": plots,
        "hf": hf,
        "docs": docs,
        "dev": [*tests, "ruff>=0.9", "mypy>=1.13", "pydoclint>=0.6", "types-tqdm", *plots, *hf, *docs],
    },
    entry_points={"console_scripts": ["ds-sparkling = ds_sparkling.cli:main"]},
)
