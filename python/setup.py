"""Builds the C part of the package where there is a compiler; without it, numpy does the same more slowly.

What is built is a plain shared library for ctypes: it needs no headers of Python, and defines no module.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "ingestd._native",
            ["ingestd/_native.c"],
            extra_compile_args=[
                "-O3",
                "-std=gnu11",
                "-ffp-contract=off",
                "-fno-trapping-math",
                "-fvisibility=hidden",
            ],
            optional=True,
        )
    ]
)
