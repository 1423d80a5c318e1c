#!/bin/sh
# Runs once, when PostgreSQL makes its data folder: a role and a database per service, closed to the others.
set -eu
for service in identity models endpoints inference training; do
    psql -v ON_ERROR_STOP=1 --username "$POSTGRES_USER" --dbname postgres \
        --set=service="$service" --set=password="$(cat "/run/secrets/esd/$service")" <<'SQL'
CREATE ROLE :"service" LOGIN PASSWORD :'password';
CREATE DATABASE :"service" OWNER :"service" TEMPLATE template0;
REVOKE CONNECT ON DATABASE :"service" FROM PUBLIC;
SQL
done
