# Workers that prepare corpora with Apache Beam, see docs/data.md.
# Not built: its pip line was run in a virtual environment with Python 3.12.
#   docker build -f docker/beam.Dockerfile -t dicetalk-beam .
FROM apache/beam_python3.12_sdk:2.77.0

# Dataflow needs more: --build-arg EXTRA='apache-beam[gcp]'
ARG EXTRA=
COPY requirements/beam.txt requirements/beam.lock /tmp/
RUN pip install --no-cache-dir --requirement /tmp/beam.txt --constraint /tmp/beam.lock ${EXTRA}

COPY dicetalk_jax /dicetalk/dicetalk_jax
COPY data_pipelines /dicetalk/data_pipelines
ENV PYTHONPATH=/dicetalk
