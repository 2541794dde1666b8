.PHONY: quickstart test lint

quickstart:
	./scripts/quickstart.sh

test:
	./scripts/test.sh

lint:
	./scripts/test.sh tests/test_static.py
