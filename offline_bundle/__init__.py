"""The offline bundler: one complete, signed delivery that carries weights, wheels and policy across the air gap."""
