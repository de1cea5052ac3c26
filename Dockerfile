# The gateway without an engine: docker build --build-arg BASE_IMAGE=<a Python 3.11 slim image> .
# Engines run beside it as `urls` engines, or build with ENGINE=cpu / ENGINE=cuda.
ARG BASE_IMAGE=python:3.11-slim
FROM ${BASE_IMAGE} AS build
ARG ENGINE=none
WORKDIR /opt/cloister
COPY requirements requirements
RUN python -m venv /opt/venv \
 && case "$ENGINE" in none) lock=runtime ;; *) lock="runtime-$ENGINE" ;; esac \
 && /opt/venv/bin/pip install --no-cache-dir --no-deps --require-hashes --only-binary :all: -r "requirements/$lock.lock"
COPY pyproject.toml README.md LICENSE ./
COPY gateway gateway
COPY offline_bundle offline_bundle
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps .

FROM ${BASE_IMAGE}
RUN useradd --uid 10001 --home-dir /var/lib/cloister --create-home --shell /usr/sbin/nologin cloister
COPY --from=build /opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH CLOISTER_HOME=/var/lib/cloister PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
WORKDIR /var/lib/cloister
EXPOSE 8080 9090
ENTRYPOINT ["cloister"]
CMD ["serve", "--config", "/etc/cloister/cloister.toml"]
