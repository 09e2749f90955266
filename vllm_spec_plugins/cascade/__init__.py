# SPDX-License-Identifier: Apache-2.0
"""Which stage answers, and which answers are kept. Pure: knows neither vLLM nor models."""
