INSERT INTO training (id, owner, status, create_time, params, config, fm_type, instance_type, deadline_seconds, base,
                      dataset_prefix, regularisation_prefix, session, num_kept, state, files, progress, waits_for, outcome,
                      reason, end_time, is_settled) VALUES
    ('44444444-0000-4000-8000-000000000001', 'ann', 'Training', '2026-07-01 10:00:00.25+00',
     '{"training_params": {"fm_type": "sd_1_5"}, "config_params": {}, "training_type": "kohya"}', '{"output_name": "zog"}',
     'sd_1_5', 'ml.g5.2xlarge', 3600, '{"name": "a.safetensors", "key": "a", "size_bytes": 1, "sha256": ""}',
     'dataset/zogs/', '', '55555555-0000-4000-8000-000000000001', 7, '{"key": "b", "epoch": 1}', '[]', '{"step": 4}', '',
     NULL, '', NULL, false),
    ('44444444-0000-4000-8000-000000000002', 'bob', 'Failed', '2026-07-01 10:00:00+00', '{}', '{}', 'sd_xl', 'small', NULL,
     '{}', 'dataset/a/', 'dataset/b/', NULL, 0, NULL, '[]', NULL, '', 'Failed', 'the dataset has no picture',
     '2026-07-01 11:00:00+00', true);
INSERT INTO training_event (training_id, kind, data, time) VALUES
    ('44444444-0000-4000-8000-000000000001', 'log', '{"line": "4 pictures"}', '2026-07-01 10:01:00+00');
INSERT INTO training_metric VALUES
    ('44444444-0000-4000-8000-000000000001', 4, 1, 0.5, 0.25, '{"unet": 0.001}');
INSERT INTO leftover VALUES ('kohya/train/x/work/', '2026-07-01 10:00:00+00', '2026-07-02 10:00:00+00');
