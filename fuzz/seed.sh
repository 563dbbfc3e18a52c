#!/usr/bin/env bash
# Writes the corpora in fuzz/corpus from the recordings in tests/fixtures.
set -euo pipefail
cd "$(dirname "$0")/.."
cargo test --locked --lib fuzzing::tests::write_corpora -- --ignored --exact
