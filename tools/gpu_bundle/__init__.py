"""`make gpu-bundle`: one archive that runs this project's servers, tests and benchmarks on a GPU
machine that reaches no package registry."""
