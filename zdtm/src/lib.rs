//! Conformance workloads and their runner.
