from setuptools import find_namespace_packages, setup

EXAMPLES = ["transformers>=5.17,<5.23", "accelerate>=1.10,<2", "tqdm"]
TOOLS = ["rich>=13", "matplotlib>=3.9,<4"]  # what the commands of ds-llep print and draw with

setup(
    name="ds_llep",
    version="0.1.0",
    description="Load balancing for expert-parallel Mixture-of-Experts training with DeepSpeed",
    license="Apache-2.0",
    python_requires=">=3.10",
    # kernels/ is installed as ds_llep.kernels through the symlink ds_llep/kernels, and has no
    # __init__.py: a top-level package of that name would hide the one that transformers imports.
    packages=find_namespace_packages(include=["ds_llep*"]),
    package_data={"ds_llep.bench": ["*.npz"], "ds_llep.kernels": ["*.c", "*.h"]},
    entry_points={"console_scripts": ["ds-llep = ds_llep.cli:main"]},
    install_requires=[
        "deepspeed==0.19.8",
        "torch>=2.11,<2.14",
        "triton>=3.6,<4; platform_system == 'Linux'",
        "mpi4py>=4.1,<5",
        "pydantic>=2.11,<3",
        "numpy>=2.0,<3",
        "packaging",
    ],
    extras_require={
        "examples": EXAMPLES,
        "tools": TOOLS,
        # ruff is kept to one minor version: another one may format differently.
        "dev": [
            *(*EXAMPLES, *TOOLS, "pytest>=8", "pytest-xdist>=3", "hypothesis>=6"),
            "peft>=0.21",
            *("scipy>=1.13", "ruff>=0.17,<0.18", "build>=1"),
            "openmpi>=5,<6; platform_system == 'Linux'",  # mpirun, and the library for mpi4py
            "trl>=1.16,<2",  # for its example's test
        ],
    },
)
