# SPDX-License-Identifier: Apache-2.0
"""What a person runs: the demonstration, the measurements, the check of an installation."""
