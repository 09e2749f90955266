# SPDX-License-Identifier: Apache-2.0
"""The one path through vLLM: propose, verify, commit. The only package, with cpu/ and tools/, that imports vllm."""
