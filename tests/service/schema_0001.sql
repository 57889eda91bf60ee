BEGIN TRANSACTION;
CREATE TABLE adapter_versions (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(512) NOT NULL, 
	tenant_id VARCHAR(64) NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	job_id VARCHAR(64), 
	base_model TEXT NOT NULL, 
	base_fingerprint TEXT NOT NULL, 
	checkpoint_id VARCHAR(64), 
	step INTEGER, 
	created_at FLOAT NOT NULL, 
	metrics JSON NOT NULL, 
	provenance JSON, 
	CONSTRAINT fk_adapter_versions_job_id FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE SET NULL, 
	CONSTRAINT fk_adapter_versions_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE, 
	CONSTRAINT uq_adapter_versions_checkpoint_id UNIQUE (checkpoint_id), 
	CONSTRAINT uq_adapter_versions_id UNIQUE (id)
);
INSERT INTO "adapter_versions" VALUES(1,'some-id','tenant-1','some-digest','some-id','some-base_model','some-base_fingerprint','some-checkpoint_id',1,1.0,'{"text": ["some-metrics"]}','{"text": ["some-provenance"]}');
CREATE TABLE alembic_version (
	version_num VARCHAR(32) NOT NULL, 
	CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num)
);
INSERT INTO "alembic_version" VALUES('0001');
CREATE TABLE alias_moves (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	tenant_id VARCHAR(64) NOT NULL, 
	alias VARCHAR(64) NOT NULL, 
	model VARCHAR(512) NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	previous INTEGER, 
	created_at FLOAT NOT NULL, 
	CONSTRAINT fk_alias_moves_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE
);
INSERT INTO "alias_moves" VALUES(1,'tenant-1','some-alias','some-model','some-kind',1,1.0);
CREATE TABLE aliases (
	tenant_id VARCHAR(64) NOT NULL, 
	name VARCHAR(64) NOT NULL, 
	move INTEGER NOT NULL, 
	CONSTRAINT pk_aliases PRIMARY KEY (tenant_id, name), 
	CONSTRAINT fk_aliases_move FOREIGN KEY(move) REFERENCES alias_moves (seq), 
	CONSTRAINT fk_aliases_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE
);
INSERT INTO "aliases" VALUES('tenant-1','some-name',1);
CREATE TABLE api_keys (
	id VARCHAR(32) NOT NULL, 
	tenant_id VARCHAR(64) NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	role VARCHAR(16) NOT NULL, 
	name VARCHAR(64), 
	created_at FLOAT NOT NULL, 
	expires_at FLOAT, 
	CONSTRAINT pk_api_keys PRIMARY KEY (id), 
	CONSTRAINT fk_api_keys_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE
);
INSERT INTO "api_keys" VALUES('some-id','tenant-1','some-digest','some-role','some-name',1.0,1.0);
CREATE TABLE audit_log (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(64) NOT NULL, 
	at FLOAT NOT NULL, 
	actor VARCHAR(64) NOT NULL, 
	action VARCHAR(32) NOT NULL, 
	tenant_id VARCHAR(64), 
	details JSON NOT NULL, 
	CONSTRAINT uq_audit_log_id UNIQUE (id)
);
INSERT INTO "audit_log" VALUES(1,'some-id',1.0,'some-actor','some-action','tenant-1','{"text": ["some-details"]}');
CREATE TABLE captures (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(64) NOT NULL, 
	tenant_id VARCHAR(64) NOT NULL, 
	user_digest VARCHAR(64) NOT NULL, 
	model VARCHAR(512) NOT NULL, 
	prompt JSON NOT NULL, 
	answer TEXT NOT NULL, 
	bytes INTEGER NOT NULL, 
	created_at FLOAT NOT NULL, 
	CONSTRAINT fk_captures_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE, 
	CONSTRAINT uq_captures_id UNIQUE (id)
);
INSERT INTO "captures" VALUES(1,'some-id','tenant-1','some-user_digest','some-model','{"text": ["some-prompt"]}','some-answer',1,1.0);
CREATE TABLE completions (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(64) NOT NULL, 
	tenant_id VARCHAR(64) NOT NULL, 
	model VARCHAR(512) NOT NULL, 
	digest VARCHAR(64), 
	alias VARCHAR(64), 
	experiment_id VARCHAR(64), 
	arm VARCHAR(16), 
	unit VARCHAR(32), 
	answer_digest VARCHAR(8), 
	created_at FLOAT NOT NULL, 
	CONSTRAINT fk_completions_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE, 
	CONSTRAINT uq_completions_id UNIQUE (id)
);
INSERT INTO "completions" VALUES(1,'some-id','tenant-1','some-model','some-digest','some-alias','some-experiment_id','some-arm','some-unit','some-ans',1.0);
CREATE TABLE drift_events (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(64) NOT NULL, 
	tenant_id VARCHAR(64) NOT NULL, 
	model VARCHAR(512) NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	signal VARCHAR(32) NOT NULL, 
	state VARCHAR(24) NOT NULL, 
	previous VARCHAR(24) NOT NULL, 
	statistic FLOAT, 
	threshold FLOAT, 
	samples BIGINT NOT NULL, 
	at FLOAT NOT NULL, 
	"by" VARCHAR(32), 
	note TEXT, 
	CONSTRAINT fk_drift_events_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE, 
	CONSTRAINT uq_drift_events_id UNIQUE (id)
);
INSERT INTO "drift_events" VALUES(1,'some-id','tenant-1','some-model','some-digest','some-signal','some-state','some-previous',1.0,1.0,1,1.0,'some-by','some-note');
CREATE TABLE drift_states (
	stream INTEGER NOT NULL, 
	signal VARCHAR(32) NOT NULL, 
	state VARCHAR(24) NOT NULL, 
	statistic FLOAT, 
	threshold FLOAT, 
	samples BIGINT NOT NULL, 
	since FLOAT NOT NULL, 
	num_calm INTEGER NOT NULL, 
	acknowledged_at FLOAT, 
	acknowledged_by VARCHAR(32), 
	acknowledged_note TEXT, 
	CONSTRAINT pk_drift_states PRIMARY KEY (stream, signal), 
	CONSTRAINT fk_drift_states_stream FOREIGN KEY(stream) REFERENCES drift_streams (seq) ON DELETE CASCADE
);
INSERT INTO "drift_states" VALUES(1,'some-signal','some-state',1.0,1.0,1,1.0,1,1.0,'some-acknowledged_by','some-acknowledged_note');
CREATE TABLE drift_streams (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(64) NOT NULL, 
	tenant_id VARCHAR(64) NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	model VARCHAR(512) NOT NULL, 
	basis VARCHAR(128) NOT NULL, 
	reference_basis VARCHAR(128), 
	salt BLOB NOT NULL, 
	sampling BLOB, 
	input_state BLOB, 
	output_state BLOB, 
	samples BIGINT NOT NULL, 
	created_at FLOAT NOT NULL, 
	seen_at FLOAT NOT NULL, 
	CONSTRAINT fk_drift_streams_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE, 
	CONSTRAINT uq_drift_streams_id UNIQUE (id), 
	CONSTRAINT uq_drift_streams_tenant_id_digest UNIQUE (tenant_id, digest)
);
INSERT INTO "drift_streams" VALUES(1,'some-id','tenant-1','some-digest','some-model','some-basis','some-reference_basis',X'736F6D652D73616C74',X'736F6D652D73616D706C696E67',X'736F6D652D696E7075745F7374617465',X'736F6D652D6F75747075745F7374617465',1,1.0,1.0);
CREATE TABLE experiment_measures (
	experiment_id VARCHAR(64) NOT NULL, 
	arm VARCHAR(16) NOT NULL, 
	name VARCHAR(32) NOT NULL, 
	count BIGINT NOT NULL, 
	total FLOAT NOT NULL, 
	squares FLOAT NOT NULL, 
	CONSTRAINT pk_experiment_measures PRIMARY KEY (experiment_id, arm, name), 
	CONSTRAINT fk_experiment_measures_experiment_id FOREIGN KEY(experiment_id) REFERENCES experiments (id) ON DELETE CASCADE
);
INSERT INTO "experiment_measures" VALUES('some-id','some-arm','some-name',1,1.0,1.0);
CREATE TABLE experiments (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(64) NOT NULL, 
	tenant_id VARCHAR(64) NOT NULL, 
	alias VARCHAR(64) NOT NULL, 
	kind VARCHAR(16) NOT NULL, 
	stable_model VARCHAR(512) NOT NULL, 
	stable_digest VARCHAR(64) NOT NULL, 
	model VARCHAR(512) NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	percent FLOAT NOT NULL, 
	policy JSON NOT NULL, 
	created_at FLOAT NOT NULL, 
	outcome VARCHAR(16), 
	reason TEXT, 
	ended_at FLOAT, 
	CONSTRAINT fk_experiments_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE, 
	CONSTRAINT uq_experiments_id UNIQUE (id)
);
INSERT INTO "experiments" VALUES(1,'some-id','tenant-1','some-alias','some-kind','some-stable_model','some-stable_digest','some-model','some-digest',1.0,'{"text": ["some-policy"]}',1.0,'some-outcome','some-reason',1.0);
CREATE TABLE feedback (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(64) NOT NULL, 
	tenant_id VARCHAR(64) NOT NULL, 
	completion_id VARCHAR(64) NOT NULL, 
	user_digest VARCHAR(64) NOT NULL, 
	rating FLOAT, 
	label VARCHAR(128), 
	corrected TEXT, 
	model VARCHAR(512) NOT NULL, 
	digest VARCHAR(64), 
	alias VARCHAR(64), 
	experiment_id VARCHAR(64), 
	arm VARCHAR(16), 
	unit VARCHAR(32), 
	represents_unit BOOLEAN NOT NULL, 
	correct FLOAT, 
	accuracy_block INTEGER, 
	rating_block INTEGER, 
	created_at FLOAT NOT NULL, 
	updated_at FLOAT NOT NULL, 
	CONSTRAINT fk_feedback_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE, 
	CONSTRAINT uq_feedback_id UNIQUE (id), 
	CONSTRAINT uq_feedback_tenant_id_completion_id_user_digest UNIQUE (tenant_id, completion_id, user_digest)
);
INSERT INTO "feedback" VALUES(1,'some-id','tenant-1','some-completion_id','some-user_digest',1.0,'some-label','some-corrected','some-model','some-digest','some-alias','some-experiment_id','some-arm','some-unit',1,1.0,1,1,1.0,1.0);
CREATE TABLE files (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(64) NOT NULL, 
	tenant_id VARCHAR(64) NOT NULL, 
	filename TEXT NOT NULL, 
	purpose VARCHAR(32) NOT NULL, 
	bytes BIGINT NOT NULL, 
	sha256 VARCHAR(64) NOT NULL, 
	storage_key TEXT NOT NULL, 
	created_at FLOAT NOT NULL, 
	expires_at FLOAT, 
	CONSTRAINT fk_files_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE, 
	CONSTRAINT uq_files_id UNIQUE (id)
);
INSERT INTO "files" VALUES(1,'some-id','tenant-1','some-filename','some-purpose',1,'some-sha256','some-storage_key',1.0,1.0);
CREATE TABLE gate_policies (
	tenant_id VARCHAR(64) NOT NULL, 
	policy JSON NOT NULL, 
	updated_at FLOAT NOT NULL, 
	CONSTRAINT pk_gate_policies PRIMARY KEY (tenant_id), 
	CONSTRAINT fk_gate_policies_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE
);
INSERT INTO "gate_policies" VALUES('tenant-1','{"text": ["some-policy"]}',1.0);
CREATE TABLE job_events (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(64) NOT NULL, 
	job_id VARCHAR(64) NOT NULL, 
	created_at FLOAT NOT NULL, 
	level VARCHAR(8) NOT NULL, 
	type VARCHAR(8) NOT NULL, 
	message TEXT NOT NULL, 
	data JSON, 
	CONSTRAINT fk_job_events_job_id FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE, 
	CONSTRAINT uq_job_events_id UNIQUE (id)
);
INSERT INTO "job_events" VALUES(1,'some-id','some-id',1.0,'some-lev','some-typ','some-message','{"text": ["some-data"]}');
CREATE TABLE job_metadata (
	job_id VARCHAR(64) NOT NULL, 
	"key" VARCHAR(64) NOT NULL, 
	value VARCHAR(512) NOT NULL, 
	CONSTRAINT pk_job_metadata PRIMARY KEY (job_id, "key"), 
	CONSTRAINT fk_job_metadata_job_id FOREIGN KEY(job_id) REFERENCES jobs (id) ON DELETE CASCADE
);
INSERT INTO "job_metadata" VALUES('some-id','some-key','some-value');
CREATE TABLE jobs (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(64) NOT NULL, 
	tenant_id VARCHAR(64) NOT NULL, 
	spec JSON NOT NULL, 
	training_file VARCHAR(64) NOT NULL, 
	validation_file VARCHAR(64), 
	evaluation_file VARCHAR(64), 
	parent_digest VARCHAR(64), 
	state VARCHAR(16) NOT NULL, 
	files_validated BOOLEAN NOT NULL, 
	paused BOOLEAN NOT NULL, 
	attempt INTEGER NOT NULL, 
	num_lost_leases INTEGER NOT NULL, 
	worker VARCHAR(128), 
	lease_renewed_at FLOAT, 
	lease_expires_at FLOAT, 
	created_at FLOAT NOT NULL, 
	finished_at FLOAT, 
	estimated_finish FLOAT, 
	trained_tokens BIGINT, 
	booked_tokens BIGINT NOT NULL, 
	key_id VARCHAR(32), 
	resolved JSON, 
	resume_point TEXT, 
	fine_tuned_model TEXT, 
	result_files JSON NOT NULL, 
	error JSON, 
	data_report JSON, 
	estimate JSON, 
	tokens_per_second FLOAT, 
	idempotency_key TEXT, 
	request_digest VARCHAR(64) NOT NULL, 
	CONSTRAINT fk_jobs_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE, 
	CONSTRAINT uq_jobs_id UNIQUE (id)
);
INSERT INTO "jobs" VALUES(1,'some-id','tenant-1','{"text": ["some-spec"]}','some-training_file','some-validation_file','some-evaluation_file','some-parent_digest','some-state',1,1,1,1,'some-worker',1.0,1.0,1.0,1.0,1.0,1,1,'some-key_id','{"text": ["some-resolved"]}','some-resume_point','some-fine_tuned_model','{"text": ["some-result_files"]}','{"text": ["some-error"]}','{"text": ["some-data_report"]}','{"text": ["some-estimate"]}',1.0,'some-idempotency_key','some-request_digest');
CREATE TABLE merges (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(64) NOT NULL, 
	tenant_id VARCHAR(64) NOT NULL, 
	model VARCHAR(512) NOT NULL, 
	digest VARCHAR(64) NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	attempt INTEGER NOT NULL, 
	lease_expires_at FLOAT, 
	bytes BIGINT NOT NULL, 
	report JSON, 
	error JSON, 
	created_at FLOAT NOT NULL, 
	finished_at FLOAT, 
	expires_at FLOAT, 
	CONSTRAINT fk_merges_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE, 
	CONSTRAINT uq_merges_id UNIQUE (id)
);
INSERT INTO "merges" VALUES(1,'some-id','tenant-1','some-model','some-digest','some-state',1,1.0,1,'{"text": ["some-report"]}','{"text": ["some-error"]}',1.0,1.0,1.0);
CREATE TABLE quality_blocks (
	tenant_id VARCHAR(64) NOT NULL, 
	model VARCHAR(512) NOT NULL, 
	measure VARCHAR(16) NOT NULL, 
	number INTEGER NOT NULL, 
	count INTEGER NOT NULL, 
	total FLOAT NOT NULL, 
	updated_at FLOAT NOT NULL, 
	CONSTRAINT pk_quality_blocks PRIMARY KEY (tenant_id, model, measure, number), 
	CONSTRAINT fk_quality_blocks_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE
);
INSERT INTO "quality_blocks" VALUES('tenant-1','some-model','some-measure',1,1,1.0,1.0);
CREATE TABLE quality_streams (
	tenant_id VARCHAR(64) NOT NULL, 
	model VARCHAR(512) NOT NULL, 
	digest VARCHAR(64), 
	created_at FLOAT NOT NULL, 
	fell_at FLOAT, 
	reason TEXT, 
	told_at FLOAT, 
	CONSTRAINT pk_quality_streams PRIMARY KEY (tenant_id, model), 
	CONSTRAINT fk_quality_streams_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE
);
INSERT INTO "quality_streams" VALUES('tenant-1','some-model','some-digest',1.0,1.0,'some-reason',1.0);
CREATE TABLE removals (
	tenant_id VARCHAR(64) NOT NULL, 
	left_behind JSON NOT NULL, 
	removed_at FLOAT NOT NULL, 
	CONSTRAINT pk_removals PRIMARY KEY (tenant_id)
);
INSERT INTO "removals" VALUES('tenant-1','{"text": ["some-left_behind"]}',1.0);
CREATE TABLE retraining_events (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	proposal_id VARCHAR(64) NOT NULL, 
	created_at FLOAT NOT NULL, 
	message TEXT NOT NULL, 
	CONSTRAINT fk_retraining_events_proposal_id FOREIGN KEY(proposal_id) REFERENCES retraining_proposals (id) ON DELETE CASCADE
);
INSERT INTO "retraining_events" VALUES(1,'some-id',1.0,'some-message');
CREATE TABLE retraining_proposals (
	seq INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, 
	id VARCHAR(64) NOT NULL, 
	tenant_id VARCHAR(64) NOT NULL, 
	target VARCHAR(512) NOT NULL, 
	model VARCHAR(512) NOT NULL, 
	digest VARCHAR(64), 
	alias VARCHAR(64), 
	"trigger" VARCHAR(16) NOT NULL, 
	reason TEXT NOT NULL, 
	options JSON NOT NULL, 
	state VARCHAR(16) NOT NULL, 
	revision INTEGER NOT NULL, 
	attempts INTEGER NOT NULL, 
	seed INTEGER NOT NULL, 
	missing TEXT, 
	counts JSON, 
	training_file VARCHAR(64), 
	validation_file VARCHAR(64), 
	original_job VARCHAR(64), 
	report JSON, 
	estimate JSON, 
	error JSON, 
	job_id VARCHAR(64), 
	created_at FLOAT NOT NULL, 
	collected_at FLOAT, 
	texts_until FLOAT, 
	erased BOOLEAN NOT NULL, 
	started_at FLOAT, 
	ended_at FLOAT, 
	CONSTRAINT fk_retraining_proposals_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE, 
	CONSTRAINT uq_retraining_proposals_id UNIQUE (id)
);
INSERT INTO "retraining_proposals" VALUES(1,'some-id','tenant-1','some-target','some-model','some-digest','some-alias','some-trigger','some-reason','{"text": ["some-options"]}','some-state',1,1,1,'some-missing','{"text": ["some-counts"]}','some-training_file','some-validation_file','some-original_job','{"text": ["some-report"]}','{"text": ["some-estimate"]}','{"text": ["some-error"]}','some-job_id',1.0,1.0,1.0,1,1.0,1.0);
CREATE TABLE tenant_limits (
	tenant_id VARCHAR(64) NOT NULL, 
	requests_per_minute BIGINT, 
	tokens_per_minute BIGINT, 
	max_files BIGINT, 
	max_bytes BIGINT, 
	max_jobs BIGINT, 
	max_adapters BIGINT, 
	CONSTRAINT pk_tenant_limits PRIMARY KEY (tenant_id), 
	CONSTRAINT fk_tenant_limits_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE
);
INSERT INTO "tenant_limits" VALUES('tenant-1',1,1,1,1,1,1);
CREATE TABLE tenant_settings (
	tenant_id VARCHAR(64) NOT NULL, 
	capture BOOLEAN NOT NULL, 
	capture_days INTEGER NOT NULL, 
	retraining VARCHAR(16) NOT NULL, 
	CONSTRAINT pk_tenant_settings PRIMARY KEY (tenant_id), 
	CONSTRAINT fk_tenant_settings_tenant_id FOREIGN KEY(tenant_id) REFERENCES tenants (id) ON DELETE CASCADE
);
INSERT INTO "tenant_settings" VALUES('tenant-1',1,1,'some-retraining');
CREATE TABLE tenants (
	id VARCHAR(64) NOT NULL, 
	name VARCHAR(64) NOT NULL, 
	created_at FLOAT NOT NULL, 
	CONSTRAINT pk_tenants PRIMARY KEY (id), 
	CONSTRAINT uq_tenants_name UNIQUE (name)
);
INSERT INTO "tenants" VALUES('tenant-1','some-name',1.0);
CREATE TABLE usage_entries (
	id VARCHAR(64) NOT NULL, 
	booked_at FLOAT NOT NULL, 
	CONSTRAINT pk_usage_entries PRIMARY KEY (id)
);
INSERT INTO "usage_entries" VALUES('some-id',1.0);
CREATE TABLE usage_hours (
	tenant_id VARCHAR(64) NOT NULL, 
	hour BIGINT NOT NULL, 
	key_id VARCHAR(32) NOT NULL, 
	model VARCHAR(512) NOT NULL, 
	requests BIGINT NOT NULL, 
	prompt_tokens BIGINT NOT NULL, 
	completion_tokens BIGINT NOT NULL, 
	cached_tokens BIGINT NOT NULL, 
	training_tokens BIGINT NOT NULL, 
	CONSTRAINT pk_usage_hours PRIMARY KEY (tenant_id, hour, key_id, model)
);
INSERT INTO "usage_hours" VALUES('tenant-1',1,'some-key_id','some-model',1,1,1,1,1);
CREATE INDEX ix_audit_log_tenant_id ON audit_log (tenant_id);
CREATE INDEX ix_usage_entries_booked_at ON usage_entries (booked_at);
CREATE INDEX usage_by_hour ON usage_hours (hour);
CREATE INDEX moves_by_alias ON alias_moves (tenant_id, alias, seq);
CREATE INDEX ix_api_keys_tenant_id ON api_keys (tenant_id);
CREATE INDEX captures_by_tenant ON captures (tenant_id, seq);
CREATE INDEX ix_completions_created_at ON completions (created_at);
CREATE INDEX ix_completions_tenant_id ON completions (tenant_id);
CREATE INDEX drift_events_by_digest ON drift_events (tenant_id, digest, seq);
CREATE INDEX drift_events_by_tenant ON drift_events (tenant_id, seq);
CREATE INDEX ix_drift_streams_seen_at ON drift_streams (seen_at);
CREATE INDEX experiments_by_alias ON experiments (tenant_id, alias, seq);
CREATE UNIQUE INDEX one_running_experiment ON experiments (tenant_id, alias, kind) WHERE outcome IS NULL;
CREATE INDEX feedback_by_digest ON feedback (tenant_id, digest, created_at);
CREATE INDEX feedback_by_unit ON feedback (experiment_id, unit);
CREATE INDEX ix_feedback_created_at ON feedback (created_at);
CREATE INDEX ix_files_tenant_id ON files (tenant_id);
CREATE INDEX jobs_by_state ON jobs (state, seq);
CREATE INDEX jobs_by_tenant ON jobs (tenant_id, seq);
CREATE INDEX ix_merges_tenant_id ON merges (tenant_id);
CREATE INDEX ix_quality_blocks_updated_at ON quality_blocks (updated_at);
CREATE INDEX ix_retraining_proposals_job_id ON retraining_proposals (job_id);
CREATE UNIQUE INDEX one_open_retraining ON retraining_proposals (tenant_id, target) WHERE state IN ('collecting', 'insufficient', 'checking', 'proposed');
CREATE INDEX retraining_by_state ON retraining_proposals (state);
CREATE INDEX retraining_by_tenant ON retraining_proposals (tenant_id, seq);
CREATE INDEX ix_adapter_versions_digest ON adapter_versions (digest);
CREATE INDEX ix_adapter_versions_job_id ON adapter_versions (job_id);
CREATE INDEX ix_adapter_versions_tenant_id ON adapter_versions (tenant_id);
CREATE INDEX events_by_job ON job_events (job_id, seq);
CREATE INDEX ix_retraining_events_proposal_id ON retraining_events (proposal_id);
DELETE FROM "sqlite_sequence";
INSERT INTO "sqlite_sequence" VALUES('audit_log',1);
INSERT INTO "sqlite_sequence" VALUES('alias_moves',1);
INSERT INTO "sqlite_sequence" VALUES('captures',1);
INSERT INTO "sqlite_sequence" VALUES('completions',1);
INSERT INTO "sqlite_sequence" VALUES('drift_events',1);
INSERT INTO "sqlite_sequence" VALUES('drift_streams',1);
INSERT INTO "sqlite_sequence" VALUES('experiments',1);
INSERT INTO "sqlite_sequence" VALUES('feedback',1);
INSERT INTO "sqlite_sequence" VALUES('files',1);
INSERT INTO "sqlite_sequence" VALUES('jobs',1);
INSERT INTO "sqlite_sequence" VALUES('merges',1);
INSERT INTO "sqlite_sequence" VALUES('retraining_proposals',1);
INSERT INTO "sqlite_sequence" VALUES('adapter_versions',1);
INSERT INTO "sqlite_sequence" VALUES('job_events',1);
INSERT INTO "sqlite_sequence" VALUES('retraining_events',1);
COMMIT;
