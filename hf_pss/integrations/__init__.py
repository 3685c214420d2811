"""PSS in other programs and frameworks: `hf-pss exec`, axolotl and Lightning."""
