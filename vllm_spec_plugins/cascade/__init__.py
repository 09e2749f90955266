# SPDX-License-Identifier: Apache-2.0
"""Which stage answers, token by token or request by request, and which answers are kept. Pure: knows neither vLLM nor models."""
