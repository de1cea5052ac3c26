# docker build --build-arg BASE_IMAGE=<any Debian image with Python 3.11> [--build-arg ENGINE=cpu] .
#
# Without an engine (the default) it is the gateway and the auditor: engines run elsewhere and are named by `urls`.
# ENGINE=cpu or ENGINE=cuda adds the locked engine. An engine started in the container is sealed by bubblewrap, which
# needs user namespaces: where the container runtime forbids them, `seal = "required"` refuses to start and says so.
ARG BASE_IMAGE=python:3.11-slim

FROM ${BASE_IMAGE} AS build
ARG ENGINE=none
WORKDIR /src
COPY requirements requirements
COPY scripts/install-lock.sh scripts/install-lock.sh
RUN case "${ENGINE}" in \
      none) lock=runtime ;; \
      cpu | cuda) lock="runtime-${ENGINE}" ;; \
      *) echo "ENGINE is none, cpu or cuda" >&2; exit 2 ;; \
    esac \
 && python3 -m venv /opt/cloister \
 && PIP_NO_CACHE_DIR=1 scripts/install-lock.sh /opt/cloister/bin/python requirements/bootstrap.lock \
 && PIP_NO_CACHE_DIR=1 scripts/install-lock.sh /opt/cloister/bin/python "requirements/${lock}.lock"
COPY pyproject.toml README.md LICENSE ./
COPY offline_bundle offline_bundle
COPY gateway gateway
RUN /opt/cloister/bin/python -m pip install --no-cache-dir --no-index --no-deps --no-build-isolation .

FROM ${BASE_IMAGE}
ARG ENGINE=none
RUN if [ "${ENGINE}" != none ]; then \
      apt-get update \
   && apt-get install -y --no-install-recommends bubblewrap libnuma1 \
   && rm -rf /var/lib/apt/lists/*; \
    fi \
 && groupadd --gid 10001 cloister \
 && useradd --uid 10001 --gid 10001 --home-dir /var/lib/cloister --shell /usr/sbin/nologin cloister \
 && install -d -m 0700 -o 10001 -g 10001 /var/lib/cloister
COPY --from=build /opt/cloister /opt/cloister
ENV PATH=/opt/cloister/bin:${PATH} \
    CLOISTER_HOME=/var/lib/cloister \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1
USER 10001:10001
WORKDIR /var/lib/cloister
VOLUME /var/lib/cloister
EXPOSE 8080 9090
STOPSIGNAL SIGTERM
ENTRYPOINT ["cloister"]
# The settings come from outside: -v /path/to/cloister.toml:/etc/cloister/cloister.toml:ro
CMD ["serve", "--config", "/etc/cloister/cloister.toml"]
