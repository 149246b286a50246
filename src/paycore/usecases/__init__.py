"""What paycore does, one verb a module. Use cases know stores and channels by their protocols, and no RPC."""
