"""The wire format: messages, services and their stubs, generated from protos/paycore/v1 by the build."""
