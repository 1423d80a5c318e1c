INSERT INTO roles (role_name, creator, permissions) VALUES
    ('IT Operator', 'api', '{user:all,role:all}'), ('Designer', 'ann', '{inference:all}');
INSERT INTO users (username, roles, creator, password_hash, password_encrypted) VALUES
    ('api', '{"IT Operator"}', 'api', NULL, NULL), ('ann', '{Designer}', 'api', '$argon2id$v=19$hash', 'cipher');
INSERT INTO api_keys (id, key_hash, owner, impersonate, created_at) VALUES
    ('11111111-0000-4000-8000-000000000001', repeat('a', 64), 'api', true, '2024-06-01 10:00+00'),
    ('11111111-0000-4000-8000-000000000002', repeat('b', 64), 'ann', false, '2024-06-02 10:00+00');
INSERT INTO secrets (kind, subject, secret_hash) VALUES
    ('worker', '22222222-0000-4000-8000-000000000001', repeat('c', 64));
