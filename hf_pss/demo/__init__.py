"""The demo: a built-in corpus and twin runs that differ in nothing but their guard."""
